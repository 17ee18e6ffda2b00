"""Range checks; the error for a wrong value names its key, the value, and what would work."""

from __future__ import annotations

from morphtrain.errors import UserError
from morphtrain.wording import as_yaml


def check(ok: bool, key: str, value: object, wanted: str) -> None:
    """Raise a `UserError` naming `key` unless `ok`; `wanted` says which values work."""
    if not ok:
        raise UserError(f"{key}={as_yaml(value)}: must be {wanted}")


def check_one_of(key: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a `UserError` naming `key` unless `value` is one of `choices`."""
    check(value in choices, key, value, "one of " + ", ".join(map(str, choices)))


def check_share(key: str, value: float, of: str = "", *, zero: bool = False, one: bool = False) -> None:
    """Raise a `UserError` naming `key` unless `value` lies between 0 and 1.

    Args:
        of: what it is a share of, for the message.
        zero: 0 is allowed.
        one: 1 is allowed.
    """
    low, high = "0 or more" if zero else "above 0", "at most 1" if one else "below 1"
    inside = 0 < value < 1 or (zero and value == 0) or (one and value == 1)
    check(inside, key, value, f"{low} and {high}" + (f", as a share of {of}" if of else ""))


COSTS = ("flops", "model_size", "latency")
