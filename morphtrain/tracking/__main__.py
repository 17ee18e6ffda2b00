"""Send what a tracking store missed while it could not be reached.

python -m morphtrain.tracking outputs/2026-01-31/12-00-00-000000
python -m morphtrain.tracking multirun/2026-01-31/12-00-00-000000/* --uri http://127.0.0.1:5000
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from morphtrain.addresses import shown
from morphtrain.errors import UserError
from morphtrain.flags import Parser
from morphtrain.tracking import mlflow, store, unsent
from morphtrain.wording import command_name


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 if nothing is left to send, 1 otherwise."""
    parser = Parser(
        prog=command_name("tracking"),
        description="Send to MLflow what runs could not send while the server was unreachable: params, tags, metrics, "
        "files and final status. It is safe to repeat.",
    )
    parser.add_argument("run_dir", type=Path, nargs="+", help="directory of a run, or of a sweep for its own record")
    parser.add_argument(
        "--uri",
        help="the tracking store to send to; without it, MLFLOW_TRACKING_URI or mlflow.db in the current directory, "
        "and only what was meant for that one",
    )
    logging.basicConfig(format="%(message)s")
    given = parser.parse_args(arguments)
    return 0 if all([report(directory, given.uri) for directory in given.run_dir]) else 1


def report(directory: Path, uri: str | None = None) -> bool:
    """Send what is left of one run, and print the outcome; True if nothing is left."""
    try:
        sent = send(directory, uri)
    except UserError as error:
        print(error, file=sys.stderr)
        return False
    left = f"something is left in {unsent.FILE}, try again later"
    print(f"{directory}: {'nothing to send' if sent is None else 'sent' if sent else left}")
    return sent is not False


def send(directory: Path, uri: str | None = None) -> bool | None:
    """Send what is left of the run in `directory` to `uri`.

    Its file says where it was meant to go, but does not decide where it goes: the directory may be somebody else's.

    Returns:
        Whether the store accepted all of it; None if nothing was left.

    Raises:
        UserError: if there is no such directory, or its file is damaged; if it was meant for another store than the
            configured one and no `uri` is given.
    """
    record = unsent.read(directory)
    if record is None:
        return None
    address = store.tracking_uri(uri)
    if uri is None and shown(address) != record.uri:
        here = f"the store in use here is {shown(address)} (MLFLOW_TRACKING_URI, or mlflow.db in the current directory)"
        raise UserError(f"{directory / unsent.FILE}: meant for {record.uri}; {here}; --uri {record.uri} sends it there")
    tracker = mlflow.MLflowTracker(address, record.experiment, run_id=record.run_id)
    tracker.begin(record, directory, resumed=True)
    # A file that the store refuses ends an attempt and moves to the end of the queue, so every file is tried once.
    return any(tracker.sync(patient=False) for _ in range(1 + len(record.artifacts)))


if __name__ == "__main__":
    sys.exit(main())
