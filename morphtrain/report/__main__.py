"""The command: the report about all experiments, one HTML file that needs nothing else, and its tables as CSV.

python -m morphtrain.report
python -m morphtrain.report experiments/reconfigure_interval-small --out interval.html
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from morphtrain.errors import UserError
from morphtrain.flags import Parser
from morphtrain.wording import command_name


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 if the report is written, 1 otherwise."""
    parser = Parser(
        prog=command_name("report"),
        description="Write what the experiments have found as one HTML file, which loads nothing from elsewhere, and "
        "its tables as CSV in a folder beside it. Nothing is trained; what is under way is shown as far as it is.",
    )
    parser.add_argument(
        "directory", nargs="?", type=Path, default="experiments", help="of experiments, or of one; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default="report.html", help="the file; default: %(default)s")
    try:
        _write(parser.parse_args(arguments))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _write(options: argparse.Namespace) -> None:
    from morphtrain.report.build import build  # pandas and matplotlib are slow to import; --help does without them

    if not options.directory.is_dir():
        raise UserError(f"{options.directory}: no such directory; experiments leave theirs in experiments/")
    if options.out.exists() and not options.out.is_file():
        raise UserError(f"--out {options.out}: is no file; the name of one works, as report.html")
    page, *tables = build(options.directory, options.out)
    print(f"{page}\n{tables[0].parent}/: {len(tables)} tables")


if __name__ == "__main__":
    sys.exit(main())
