"""The command: MLflow's UI on what runs have recorded, on this machine alone; of a sweep, on the view of its study.

python -m morphtrain.ui
python -m morphtrain.ui outputs/2026-01-31/12-00-00-000000 --port 5001
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from morphtrain.flags import Parser
from morphtrain.wording import command_name

if TYPE_CHECKING:
    from morphtrain.tracking.recorded import Recorded

DESCRIPTION = (
    "Look at recorded runs in MLflow's UI, served on this machine alone until Ctrl-C: those of MLFLOW_TRACKING_URI or "
    "of mlflow.db in the current directory, or of the store that a run recorded to. A run of a sweep or an experiment, "
    "and their directories, open on the runs of that study alone."
)


def main() -> None:
    """The command; exits with 1 and a message after a user's mistake, with 128 + the signal's number after a signal."""
    options = parse(sys.argv[1:])
    from morphtrain.run import with_messages  # Hydra is slow to import; --help does without it

    with_messages(lambda: _show(options))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = Parser(prog=command_name("ui"), description=DESCRIPTION, allow_abbrev=False)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("run_dir", nargs="?", type=Path, help="directory of a run, a sweep or an experiment")
    where.add_argument("--uri", help="another store, as sqlite:///elsewhere/mlflow.db")
    parser.add_argument("--port", type=int, default=5000, help="%(default)s by default; if it is taken, one after it")
    return parser.parse_args(words)


def _show(options: argparse.Namespace) -> None:
    from morphtrain.addresses import shown
    from morphtrain.schema import check
    from morphtrain.tracking import recorded, store, ui_server

    found = None if options.run_dir is None else recorded.recorded(options.run_dir)
    uri = store.tracking_uri(options.uri) if found is None else found.uri
    if uri.startswith(store.SERVERS):
        print(f"{shown(uri)} is a server, which shows itself: open it in a browser")
        return
    recorded.check_store(uri)
    check(0 < options.port < 2**16, "--port", options.port, "from 1 to 65535")
    port = ui_server.free_port(options.port)
    if port != options.port:
        print(f"port {options.port} is taken; {port} is free")
    print(f"MLflow's UI on {shown(uri)} starts; in some seconds it is at", flush=True)
    ui_server.serve(uri, port, "/" if found is None else _page(found))


def _page(found: Recorded) -> str:
    """The page that shows the study of a run; MLflow's own where the store does not say."""
    from morphtrain.addresses import shown
    from morphtrain.errors import first_line
    from morphtrain.tracking import view

    try:
        return view.page_of(found)
    except Exception as error:  # noqa: BLE001 (databases fail in too many ways to name; the server may say more)
        print(f"no view of the study: {shown(first_line(error))}", flush=True)
        return view.PLAIN


if __name__ == "__main__":
    main()
