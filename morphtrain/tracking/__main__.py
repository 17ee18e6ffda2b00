"""Send what a tracking store that was away lacks of runs.

python -m morphtrain.tracking outputs/2026-01-31/12-00-00-000000
python -m morphtrain.tracking multirun/2026-01-31/12-00-00-000000/*
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from morphtrain.errors import UserError
from morphtrain.tracking import mlflow, unsent


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 if nothing is left to send, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m morphtrain.tracking",
        description="Send to MLflow what runs could not send while the server was away: params, tags, values, files "
        "and how they ended. To the store they were for: `uri` in their unsent.json. Sending again doubles nothing.",
    )
    parser.add_argument("run_dir", type=Path, nargs="+", help="directory of a run, or of a sweep for its own record")
    logging.basicConfig(format="%(message)s")
    directories = parser.parse_args(arguments).run_dir
    return 0 if all([report(directory) for directory in directories]) else 1


def report(directory: Path) -> bool:
    """Send what is left of one run, and say what came of it; True if nothing is left."""
    try:
        sent = send(directory)
    except UserError as error:
        print(error, file=sys.stderr)
        return False
    left = f"something is left in {unsent.FILE}, try again later"
    print(f"{directory}: {'nothing to send' if sent is None else 'sent' if sent else left}")
    return sent is not False


def send(directory: Path) -> bool | None:
    """Send what is left of the run in `directory`.

    Returns:
        Whether the store took it all; None if nothing was left.

    Raises:
        UserError: for a directory or file that is none.
    """
    record = unsent.read(directory)
    if record is None:
        return None
    tracker = mlflow.MLflowTracker(record.uri, record.experiment, run_id=record.run_id)
    tracker.begin(record, directory, resumed=True)
    # A file that the store refuses ends a try and comes last in the next: each gets its chance.
    return any(tracker.sync(patient=False) for _ in range(1 + len(record.artifacts)))


if __name__ == "__main__":
    sys.exit(main())
