"""What the first process tells the others: what to train, or to end."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from morphtrain import interrupts
from morphtrain.errors import UserError
from morphtrain.processes.join import TIMEOUT
from morphtrain.schema import Config

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

ORDER, TAKEN = "order", "taken"  # keys of the store
POLL_SECONDS = 0.02
NOTICE_SECONDS = 30.0  # of waiting without a word
AWAITED = (
    "waiting for %d processes to come: so many are said to train together, by processes=%d or in the environment "
    "(RANK and WORLD_SIZE, or SLURM_STEP_NUM_TASKS)"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """The arguments of `trainer.train`, which all processes of a run have in common.

    Args:
        threads: of torch in every process; None: as many as each has.
        cwd: the directory that relative paths start from, on this host.
    """

    config: Config
    run_dir: Path
    tags: Mapping[str, str]
    threads: int | None = None
    cwd: Path = field(default_factory=Path.cwd)


def give(store: Store, order: Order | int, others: int, check: Callable[[], None]) -> None:
    """Tell the others what to train or, where there is nothing to, with which code to exit; waits until all know.

    Args:
        others: how many there are.
        check: called while this waits; it raises if they cannot come.
    """
    store.set(ORDER, pickle.dumps(order))  # type: ignore[arg-type]  # it takes bytes, too
    notice = time.monotonic() + NOTICE_SECONDS

    def all_know() -> bool:
        nonlocal notice
        if store.add(TAKEN, 0) == others:
            return True
        if time.monotonic() > notice:
            log.warning(AWAITED, others + 1, others + 1)
            notice = float("inf")
        return False

    _wait(all_know, check)


def take(store: Store) -> Order | int:
    """What the first process says, once it does."""
    _wait(lambda: store.check([ORDER]))
    order: Order | int = pickle.loads(store.get(ORDER))
    store.add(TAKEN, 1)
    return order


def _wait(condition: Callable[[], bool], check: Callable[[], None] = lambda: None) -> None:
    seconds = TIMEOUT.total_seconds()
    end = time.monotonic() + seconds
    while not condition():
        check()
        if time.monotonic() > end:
            met = f"the processes have not met within {seconds / 60:g} minutes"
            raise UserError(f"{met}; see whether all of them have been started")
        interrupts.wait(POLL_SECONDS)
