"""Numbers, values and names as messages show them."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable

# Control characters but tab and newline, lone surrogates, and what is no character: neither XML nor UTF-8 has them all.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# How the command that has all others is typed: installed by pip, or without that.
AS_A_SCRIPT, AS_A_MODULE = "morphtrain", "python -m morphtrain"


def counted(number: float, thing: str) -> str:
    """`1 channel`, `2 channels`, `0.5 epochs`; `thing` is a noun that takes an s."""
    return f"{number:.16g} {thing}" if number == 1 else f"{number:.16g} {thing}s"


def to_go(seconds: float) -> str:
    """How long something will still take: `less than a minute to go`, `12 min to go`, `2.5 h to go`."""
    minutes = seconds / 60
    if minutes < 1:
        return "less than a minute to go"
    return f"{minutes:.0f} min to go" if minutes < 100 else f"{minutes / 60:.1f} h to go"


def one_of_all(ended: int, total: int, what: object, text: str, left: float | None) -> str:
    """A line for one of several runs that has ended; `left`: the seconds that the others will take, None if unknown."""
    return f"{ended:4d}/{total} {what}:{text}" + ("" if left is None else f"  ({to_go(left)})")


def as_yaml(value: object) -> str:
    """A config value as it is typed: null, true, false, or its text."""
    plain = {None: "null", True: "true", False: "false"}
    return plain[value] if value is None or isinstance(value, bool) else str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not among `known`: those that are close to it, or else all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"


def command_name(name: str) -> str:
    """One of MorphTrain's commands as it is typed, in the form in which the one that runs was: `morphtrain run`.

    `morphtrain.__main__` leaves the form in `sys.argv[0]`; without it, a command is typed as its module.
    """
    program, _, _ = "".join(sys.argv[:1]).rpartition(" ")
    return f"{program} {name}" if program in (AS_A_SCRIPT, AS_A_MODULE) else f"{AS_A_MODULE}.{name}"


def printable(text: str) -> str:
    """The text with a replacement character for each that a page, a picture or a file of text cannot show."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
