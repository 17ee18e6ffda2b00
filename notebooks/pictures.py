"""Make all pictures that the README and the documentation show: `make pictures`, a minute or two.

They are of the search whose records the notebooks keep (data/sweeps), so that nothing is trained: its runs are put
into a tracking store of their own, as the search itself would have left them there. It needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import screenshots
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf

import morphtrain
from morphtrain import schema
from morphtrain.evidence.records import FILE, read_records
from morphtrain.schema.option import option_of
from morphtrain.tracking import begin_sweep, end_sweep
from morphtrain.tracking.mlflow import PARENT_TAG, RUN_DIR_TAG, MLflowTracker
from morphtrain.tracking.unsent import Record
from morphtrain.trainer.checkpoint import flat

RECORDS = Path(__file__).with_name("data") / "sweeps"
STUDY = "prunetrain"
NAMES = tuple(screenshots.PICTURES)


def fill(store: str, directory: Path, records: Path = RECORDS) -> None:
    """Put the stored runs of a search into an MLflow store, below a run of the search.

    Args:
        store: its address.
        directory: where the runs are said to be.
        records: a directory with a run directory a trial, as `keep.py` leaves it.
    """
    tracking: Any = morphtrain.compose(f"tracking.uri={store}").tracking
    parent = begin_sweep(tracking, STUDY, {}, directory)
    assert parent is not None
    client = MlflowClient(store)
    runs = sorted((path.parent for path in records.glob(f"*/{FILE}")), key=lambda run: int(run.name))
    for run in runs:
        config: Any = OmegaConf.to_container(OmegaConf.load(run / ".hydra" / "config.yaml"))
        overrides: Any = OmegaConf.to_container(OmegaConf.load(run / ".hydra" / "overrides.yaml"))
        searched = [override for override in overrides if override.startswith(("prune.", "optimizer."))]
        tags = {group: str(option_of(config[group])) for group in schema.OPTIONS if group in config}
        tags |= json.loads((run / "environment.json").read_text())
        tags |= {"study": STUDY, "trial": run.name, "seed": str(config["seed"])}
        history = read_records(run)
        place = directory / run.name
        place.mkdir(parents=True)
        began = int(1000 * (history[0]["timestamp"] - history[0]["epoch_seconds"]))
        ended = int(1000 * history[-1]["timestamp"])
        name = f"trial {run.name}: {' '.join(searched) or tags['prune']}"
        params = {key: str(value) for key, value in flat(config).items()}
        tags |= {RUN_DIR_TAG: str(place), PARENT_TAG: parent}
        tracker = MLflowTracker(store, tracking.experiment)
        record = Record(store, tracking.experiment, name, params, tags, began, history=history)
        tracker.begin(record, place, resumed=False)
        tracker.finish("FINISHED", history)
        client.set_terminated(tracker.run_id, "FINISHED", ended)  # when it was, and not now
    end_sweep(tracking, parent, {}, {}, [], "FINISHED")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    what = f"{', '.join(NAMES)}; without any, all of them"
    parser.add_argument("names", nargs="*", metavar="NAME", help=what)
    names = parser.parse_args().names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"{min(unknown)}: no such picture; there are {what}")
    with tempfile.TemporaryDirectory() as scratch:
        store = f"sqlite:///{scratch}/mlflow.db"
        fill(store, Path(scratch, "runs"))
        screenshots.take(store, STUDY, names=names)


if __name__ == "__main__":
    main()
