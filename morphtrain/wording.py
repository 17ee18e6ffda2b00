"""Numbers and values as messages show them."""

from __future__ import annotations


def counted(number: float, thing: str) -> str:
    """`1 channel`, `2 channels`, `0.5 epochs`; `thing` is a noun that takes an s."""
    return f"{number:.16g} {thing}" if number == 1 else f"{number:.16g} {thing}s"


def as_yaml(value: object) -> str:
    """A config value as it is typed: null, true, false, or its text."""
    plain = {None: "null", True: "true", False: "false"}
    return plain[value] if value is None or isinstance(value, bool) else str(value)
