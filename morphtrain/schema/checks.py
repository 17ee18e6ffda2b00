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


COSTS = ("flops", "model_size", "latency")
