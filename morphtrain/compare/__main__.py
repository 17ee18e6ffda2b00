"""The command: what does B cost, as a ratio to A, with an interval? Both train in one process, A B B A or B A A B.

python -m morphtrain.compare prune=none -- prune=prunetrain prune.lasso_ratio=8
python -m morphtrain.compare model.width=32 -- precision=o0 -- precision=bf16 --steps 200
python -m morphtrain.compare --steps 200 architecture=a/last.pt -- architecture=b/last.pt
python -m morphtrain.compare data=synthetic --vs my_loop.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from morphtrain.flags import Parser
from morphtrain.wording import command_name

USAGE = """{command} [COMMON.. --] A.. -- B.. [options]
       {command} A.. --vs FILE.py[:FUNCTION] [options]"""
DESCRIPTION = (
    "Train two configs in one process, in turns: a part of an epoch of A, the same of B, the next of B, the next of A, "
    "or by chance B A A B, and so on. What the machine does meanwhile is common to neighbours, so the ratio of their "
    "times is truer than that of two runs after each other. A, B and what both have in common are overrides, as those "
    "of morphtrain.run. Nothing is tracked, and nothing is written but --json."
)
STEPS_HELP = "take turns by training step and measure N of each; nothing is pruned, grown or evaluated"
SEEDS_HELP = "repeat it with each of these seeds, such as 1,2,3; ratios and differences are paired by seed"
VS_HELP = (
    "time your own code instead of B: its function epoch(), with --steps its step(), or the one that is named, after "
    "its setup() if it has one; MODULE[:FUNCTION] works too"
)


def main() -> None:
    """The command; exits with 1 and a message after a user's mistake, with 128 + the signal's number after a signal."""
    options, parts = parse(sys.argv[1:])
    from morphtrain.run import with_messages  # Hydra is slow to import; --help does without it

    def compare() -> None:
        from morphtrain.compare.command import show

        show(options, parts)

    with_messages(compare)


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[list[str]]]:
    """The options, and the overrides of each part; `--` ends a part, and options may stand in any."""
    prog = command_name("compare")
    parser = Parser(prog=prog, usage=USAGE.format(command=prog), description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, metavar="N", help=STEPS_HELP)
    parser.add_argument("--seeds", type=numbers, default=(), metavar="S,S,..", help=SEEDS_HELP)
    parser.add_argument("--vs", metavar="FILE.py", help=VS_HELP)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times, records, configs and the machine")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="with option files of your own")
    options, parts = argparse.Namespace(), []
    for part in _parts(words):
        options = parser.parse_intermixed_args(part, options)
        parts.append(vars(options).pop("overrides"))
    return options, parts


def _parts(words: Sequence[str]) -> Iterator[list[str]]:
    """The words before, between and after those that are `--`."""
    part: list[str] = []
    for word in words:
        if word == "--":
            yield part
            part = []
        else:
            part.append(word)
    yield part


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(seed) for seed in text.split(","))


if __name__ == "__main__":
    main()
