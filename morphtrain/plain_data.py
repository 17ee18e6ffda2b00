"""Is data that was read from a file of the types that the program expects?

mismatch(facts, {"epoch": int, "widths": dict[str, int], "micro_batch": int | None}, "facts")
"""

from __future__ import annotations

from types import UnionType
from typing import Any, get_args, get_origin


def mismatch(value: Any, kind: Any, name: str) -> str:
    """What about `value` is not of this kind, in a few words; "" if all is.

    Args:
        kind: a type, taken exactly, except that an int is a float too; `A | B`; `list[kind]`; `dict[str, kind]`; or the
            keys that a dict must have, it may have more, with the kind of each: `{"epoch": int}`.
        name: what the value is called in the answer.
    """
    if isinstance(kind, dict):
        return _fields(value, kind, name)
    origin = get_origin(kind)
    if origin in (list, dict):
        return _parts(value, origin, get_args(kind)[-1], name)
    if origin is UnionType:
        fits = any(not mismatch(value, one, name) for one in get_args(kind))
    else:
        fits = kind is Any or type(value) is kind or (kind is float and type(value) is int)
    return "" if fits else _is_a(value, kind, name)


def _fields(value: Any, kinds: dict[str, Any], name: str) -> str:
    if not isinstance(value, dict):
        return _is_a(value, dict, name)
    lacking = [key for key in kinds if key not in value]
    if lacking:
        return f"{name} has no {lacking[0]}"
    return next(filter(None, (mismatch(value[key], kind, f"{name}.{key}") for key, kind in kinds.items())), "")


def _parts(value: Any, container: Any, wanted: Any, name: str) -> str:
    if not isinstance(value, container):
        return _is_a(value, container, name)
    if container is dict and not all(type(key) is str for key in value):
        return f"{name} has a key that is no text"
    parts: Any = value.items() if container is dict else enumerate(value)
    return next(filter(None, (mismatch(part, wanted, f"{name}.{key}") for key, part in parts)), "")


def _is_a(value: Any, kind: Any, name: str) -> str:
    wanted = kind.__name__ if isinstance(kind, type) else str(kind)
    return f"{name} is a {type(value).__name__}, not {wanted}"
