"""Completion in a shell: its script, which asks this package by `morphtrain completion query -- WORDS`.

Hydra has completion of its own, for a program without commands and with a script in the current directory: it knows
neither `morphtrain run` nor `python -m morphtrain.run`. Its flags print the script of this package instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from morphtrain.errors import UserError
from morphtrain.wording import AS_A_SCRIPT, command_name

SHELLS = ("bash", "zsh", "fish")
REMOVAL = {
    "bash": "complete -r {names}",
    "zsh": "compdef -d {names}",
    "fish": "for name in {names}; complete --erase --command $name; end",
}


def script(shell: str) -> str:
    """What makes `shell` complete commands in the form in which this one was typed; as modules, after python."""
    text = Path(__file__).with_name(f"script.{shell}").read_text()
    return text.replace("NAMES", " ".join(_names()))


def by_hydras_flag(words: Sequence[str]) -> str:
    """The answer to Hydra's `--shell-completion install=SHELL`, or `uninstall=SHELL`.

    Raises:
        UserError: for anything else.
    """
    for word in words:
        action, _, shell = word.partition("=")
        if shell in SHELLS and action == "install":
            return script(shell)
        if shell in SHELLS and action == "uninstall":
            return REMOVAL[shell].format(names=" ".join(_names()))
    raise UserError(f"--shell-completion: must have install=SHELL or uninstall=SHELL, of {', '.join(SHELLS)}")


def _names() -> list[str]:
    """The programs whose words are completed."""
    if command_name("completion").startswith(AS_A_SCRIPT):
        return [AS_A_SCRIPT]
    return sorted({AS_A_SCRIPT, "python", "python3", Path(sys.executable).name})
