"""What every process but the first does: it waits to be told what to train, and trains it without a word."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch

from morphtrain.interrupts import Interrupted
from morphtrain.processes import join
from morphtrain.processes.order import take
from morphtrain.processes.place import place
from morphtrain.processes.watch import over
from morphtrain.trainer.train import train


def follow() -> int:
    """Train what rank 0 says; returns the exit code: 0, or another if this process or rank 0 has failed.

    Rank 0 says what went wrong; if it is gone, the watch does.
    """
    with silent():
        try:
            return _follow()
        except Interrupted as interrupt:
            return interrupt.exit_code
        except Exception:  # noqa: BLE001 - the watch has seen to it that somebody says it
            return 1


def _follow() -> int:
    here = place()
    assert here is not None
    store = join.store_of(here)
    order = take(store)
    if isinstance(order, int):
        return order
    if here.one_host:
        os.chdir(order.cwd)  # with hydra.job.chdir, that of the run
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    with over(here, store, order.config.process_timeout), join.joined(here, store, order.config.process_timeout):
        train(order.config, order.run_dir, order.tags)
    return 0


@contextmanager
def silent() -> Iterator[None]:
    """Within the block, nothing is logged, warned of or printed."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
