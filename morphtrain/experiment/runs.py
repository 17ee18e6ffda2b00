"""The runs of an experiment: which there are, in which order, and what their directories say of them."""

from __future__ import annotations

import itertools
import random
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from morphtrain.errors import UserError
from morphtrain.evidence import records
from morphtrain.evidence.calibration import is_calibrated
from morphtrain.evidence.experiment import Experiment
from morphtrain.evidence.progress import DISTURBED, ENVIRONMENT, machines
from morphtrain.schema.config import CHOSEN

Record = Mapping[str, float]

LOG = "run.log"
WARNING = re.compile(r"\S+ \S+ WARNING (.+)")  # as conf/config.yaml formats it
ROUNDING = 1e-6  # of an epoch


@dataclass(frozen=True)
class Run:
    """An arm with a seed.

    Args:
        number: of the run in the experiment, from 0.
        directory: that it has, or will have.
        after: the run whose final structure it trains.
    """

    number: int
    arm: str
    seed: int
    directory: Path
    after: Run | None = None

    @property
    def ended(self) -> bool:
        """Whether it has trained to its end, and counts."""
        return (self.directory / records.LEFT_AT_THE_END).exists() and (self.directory / records.FILE).exists()

    @property
    def spoilt(self) -> bool:
        """Whether it has failed or been disturbed, so that it has to be run from the beginning."""
        return (self.directory / DISTURBED).exists()

    def history(self) -> list[dict[str, float]]:
        """The records of its epochs."""
        return records.read_records(self.directory)

    def chosen(self) -> dict[str, str]:
        """What stood for `auto` in it, by config key; raises `UserError` for a damaged file."""
        path = self.directory / ENVIRONMENT
        found = {key: part[key] for part in machines(path)[-1:] for key in CHOSEN if key in part}
        for key, value in found.items():
            if not value.isidentifier():  # it becomes part of the next run's command line
                raise UserError(f"{path}: damaged, {key} is the name of no option")
        return found

    def warnings(self) -> list[str]:
        """What its log warns of, each kind once: of lines that differ only in numbers, the first."""
        path = self.directory / LOG
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        texts = [found.group(1) for line in lines if (found := WARNING.fullmatch(line))]
        return list({kind_of(text): text for text in reversed(texts)}.values())[::-1]

    def spoil(self) -> None:
        """Let what it has recorded count for nothing; it stays to be read until the run is repeated."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if (self.directory / records.FILE).exists():
            (self.directory / records.FILE).replace(self.directory / DISTURBED)
        else:
            (self.directory / DISTURBED).touch()

    def __str__(self) -> str:
        return f"seed {self.seed} {self.arm}"


def kind_of(warning: str) -> str:
    """The warning without its numbers."""
    return re.sub(r"[\d.]+", "", warning)


def planned(experiment: Experiment, directory: Path) -> list[Run]:
    """All runs of an experiment: seed by seed, in a seed in an order that chance has fixed once for all.

    A drift of the machine's speed so falls on all arms alike.
    """
    found: list[Run] = []
    for seed in experiment.seeds:
        order = list(experiment.arms)
        random.Random(f"{experiment.name} {seed}").shuffle(order)
        order.sort(key=lambda arm: experiment.arms[arm].of is not None)
        of_seed: dict[str, Run] = {}
        for arm in order:
            after = of_seed.get(experiment.arms[arm].of or "")
            of_seed[arm] = Run(len(found), arm, seed, directory / str(seed) / arm, after)
            found.append(of_seed[arm])
    return found


def ready(runs: Sequence[Run]) -> list[Run]:
    """Those of runs that have not ended which can start: not before the run whose structure they train."""
    return [run for run in runs if run.after is None or run.after.ended]


def contended(history: Sequence[Record]) -> bool:
    """Whether others have disturbed the run's times, and nothing has calibrated them."""
    return any(record["contended"] for record in history) and not is_calibrated(history)


def epochs_in_the_same_seconds(history: Sequence[Record]) -> int:
    """How many epochs of a run's last network fit into the seconds of the whole run, and at least one.

    All in calibrated seconds if the machine was measured again meanwhile, so that a drift of its speed cancels. Every
    network's epochs count by their median: one that was disturbed, or calibrated by a bad moment, would otherwise be in
    the whole, and not in the epoch by which it is divided. If the last network has not been trained, because it changed
    after the last epoch, it is taken to need what that took.
    """
    calibrated = is_calibrated(history)
    total = history[-1]["calibrated_train_seconds" if calibrated else "train_seconds"]
    seconds = [record["calibrated_seconds" if calibrated else "epoch_seconds"] for record in history]
    changes = [number for number, record in enumerate(history, 1) if record["changed"]]
    networks = [seconds[start:end] for start, end in itertools.pairwise((0, *changes, len(seconds)))]
    trained = sum(len(epochs) * statistics.median(epochs) for epochs in networks if epochs)
    beside = total - sum(seconds)  # set-up and changes of structure
    return max(1, int((trained + beside) / statistics.median(networks[-1] or seconds[-1:]) + ROUNDING))
