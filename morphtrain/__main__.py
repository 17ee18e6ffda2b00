"""The command `morphtrain`: one of MorphTrain's commands by its name, with what that one takes. Light to import.

morphtrain run prune=prunetrain precision=o1
python -m morphtrain run prune=prunetrain precision=o1      # the same, as is python -m morphtrain.run
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morphtrain import __version__
from morphtrain.flags import Parser
from morphtrain.wording import AS_A_MODULE, AS_A_SCRIPT, nearest

COMMANDS = {
    "run": "train one run, or with -m a grid of them",
    "sweep": "search with a preset, as `sweep prunetrain`; without one, a grid",
    "compare": "time two configs, or a config and code of your own, in turns",
    "lr_finder": "see which learning rates train",
    "maxbatch": "find the largest batch that fits a memory budget",
    "export": "write a network as ONNX, as a torch.export program or as a state dict",
    "evidence": "statistics of your own runs: table, test, fit",
    "report": "what experiments have found, as one HTML file",
    "tracking": "send what a tracking store missed",
    "ui": "look at what was recorded, in MLflow's UI",
    "completion": "complete all of this in bash, zsh or fish",
}
EPILOG = """commands:
{commands}

`{program} COMMAND --help` explains each. The arguments of run, sweep, compare, lr_finder and maxbatch are options of
groups and keys, as prune=prunetrain optimizer.lr=0.05; `{program} run --help` shows them all."""
SWEEP = """The arguments are those of run: `{program} sweep prunetrain epochs=30` is `run +sweep=prunetrain epochs=30`.
Without a preset, keys with several values make a grid: `{program} sweep seed=1,2,3` is `run -m seed=1,2,3`."""


def main(program: str = AS_A_SCRIPT) -> Any:
    """The command; returns the exit code of the one that was named, None for 0.

    Args:
        program: how it is typed; the default is that of an installed script.
    """
    name, *words = sys.argv[1:] or [""]
    if name == "sweep":
        name, words = "run", of_sweep(program, words)
    if name not in COMMANDS:
        return _say(program, name)
    if program == AS_A_SCRIPT and name != "completion" and not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, os.getcwd())  # where `python -m` finds networks and parts of the user's own
    sys.argv = [f"{program} {name}", *words]
    package = Path(__file__).with_name(name).is_dir()
    return importlib.import_module(f"morphtrain.{name}.__main__" if package else f"morphtrain.{name}").main()


def of_sweep(program: str, words: Sequence[str]) -> list[str]:
    """The arguments of `run` for those of `sweep`: the name of a preset comes first, or keys make a grid."""
    first = words[0] if words else ""
    if first not in ("", "-h", "--help"):
        is_preset = "=" not in first and first[0] not in "-~"
        return [f"+sweep={first}", *words[1:]] if is_preset else ["--multirun", *words]
    from morphtrain.schema.files import CONF  # Hydra is slow to import; the other commands do that themselves

    presets = ", ".join(sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
    parser = Parser(
        prog=f"{program} sweep",
        usage=f"{program} sweep [PRESET] [group=option | key=value ...]",
        description=f"Presets: {presets}.",
        epilog=SWEEP.format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.parse_args(list(words))
    parser.error(f"sweep: a preset is missing, as {program} sweep prunetrain; there are {presets}")


def _say(program: str, word: str) -> int:
    """Answer to what names no command: a flag, nothing, or a mistake."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    parser = Parser(
        prog=program,
        usage=f"{program} COMMAND ...",
        description="Which training-time methods make this CNN train faster on this machine, and what do they cost?",
        epilog=EPILOG.format(commands=commands, program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"morphtrain {__version__}")
    if word.startswith("-"):
        parser.parse_args([word])
    elif word:
        known = f"did you mean {program} run {word}?" if "=" in word else nearest(word, COMMANDS)
        parser.exit(2, f"{word}: no such command; {known}\n")
    parser.print_help(sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(AS_A_MODULE))
