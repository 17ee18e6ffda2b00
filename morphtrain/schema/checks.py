"""Range checks; the error for a wrong value names its key, the value, and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from morphtrain.errors import UserError
from morphtrain.wording import as_yaml


def check(ok: bool, key: str, value: object, wanted: str) -> None:
    """Raise a `UserError` naming `key` unless `ok`; `wanted` says which values work."""
    if not ok:
        raise UserError(f"{key}={as_yaml(value)}: must be {wanted}")


def check_one_of(key: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a `UserError` naming `key` unless `value` is one of `choices`."""
    check(value in choices, key, value, "one of " + ", ".join(map(str, choices)))


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not among `known`: those that are close to it, or else all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"


COSTS = ("flops", "model_size", "latency")
