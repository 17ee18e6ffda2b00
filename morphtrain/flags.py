"""Flags of a command, as argparse has them; a mistake is answered in one line. Light to import."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from morphtrain.errors import UserError
from morphtrain.processes.place import is_follower
from morphtrain.wording import nearest


class Parser(argparse.ArgumentParser):
    """Argparse's, but a mistake is answered in one line, without the usage.

    Of several processes, which torchrun or Slurm has started, the first one runs the command, and the others end here.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        try:
            if is_follower():
                sys.exit(0)
        except UserError as error:  # the environment makes no sense
            sys.exit(str(error))
        super().__init__(*arguments, **keywords)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        end(self, message)


def end(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Exit with argparse's code, 2, and its message in one line."""
    first = message.removeprefix("unrecognized arguments: ").split()[0]
    unknown = message.startswith("unrecognized")
    line = no_such_flag(first, _flags(parser)) if unknown else message.removeprefix("argument ")
    parser.exit(2, f"{' '.join(line.split())}\n")


def no_such_flag(flag: str, flags: Iterable[str]) -> str:
    """The message for a flag that is none of `flags`."""
    name = f"--{flag.lstrip('-').partition('=')[0]}"
    known = [f for f in flags if f.startswith("--")]
    return f"{flag}: no such flag; {nearest(name, [name] if name in known else known)}"


def _flags(parser: argparse.ArgumentParser) -> dict[str, None]:
    """Those of a parser and of its commands, each once."""
    found = dict.fromkeys(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= _flags(command)
    return found
