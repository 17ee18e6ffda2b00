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
from omegaconf import OmegaConf

import morphtrain
from morphtrain import schema
from morphtrain.evidence.records import FILE, read_records
from morphtrain.schema.option import option_of
from morphtrain.tracking import begin_sweep, end_sweep
from morphtrain.tracking.mlflow import MLflowTracker
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
    runs = sorted((path.parent for path in records.glob(f"*/{FILE}")), key=lambda run: int(run.name))
    for run in runs:
        config: Any = OmegaConf.to_container(OmegaConf.load(run / ".hydra" / "config.yaml"))
        overrides: Any = OmegaConf.to_container(OmegaConf.load(run / ".hydra" / "overrides.yaml"))
        searched = [override for override in overrides if override.startswith(("prune.", "optimizer."))]
        tags = {group: str(option_of(config[group])) for group in schema.OPTIONS if group in config}
        tags |= json.loads((run / "environment.json").read_text())
        tags |= {"study": STUDY, "trial": run.name, "seed": str(config["seed"])}
        tags["name"] = f"trial {run.name}: {' '.join(searched) or tags['prune']}"
        history = read_records(run)
        place = directory / run.name
        place.mkdir(parents=True)
        tracker = MLflowTracker(store, tracking.experiment, parent_run_id=parent)
        tracker.start(flat(config), tags, place, False, history)
        tracker.finish("FINISHED", history)
    end_sweep(tracking, parent, {}, {}, [], "FINISHED")


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = f"sqlite:///{scratch}/mlflow.db"
        fill(store, Path(scratch, "runs"))
        screenshots.take(store, STUDY)


if __name__ == "__main__":
    main()
