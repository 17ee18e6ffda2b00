"""The first process of a run: it tells the others what to train, and trains with them; or it trains alone.

Light to import, as long as nothing is trained.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from morphtrain import interrupts
from morphtrain.errors import UserError
from morphtrain.processes import join
from morphtrain.processes.local import shared_threads, siblings
from morphtrain.processes.order import Order, give
from morphtrain.processes.place import Place, place
from morphtrain.processes.watch import over
from morphtrain.schema import Config

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

OnEpoch = Callable[[Mapping[str, float]], bool]

log = logging.getLogger(__name__)


def train(config: Config, run_dir: Path, tags: Mapping[str, str], on_epoch: OnEpoch | None = None) -> list[float]:
    """`trainer.train`, in as many processes as have been started together, or as `config.processes` says.

    Raises:
        UserError: as `trainer.train`; if another number of processes has been started than `config.processes` says.
        RankFailed: for any fault of another process (`processes.watch`).
    """
    here = place()
    if here is not None:
        check_number(config, here)
        warn_of_restarts(config)
        order = Order(replace(config, processes=here.size), run_dir, tags)
        return _together(here, _store(here), order, on_epoch, interrupts.check)
    count = config.processes or 1
    if count == 1:
        from morphtrain.trainer import train as alone  # imports torch

        return alone(config, run_dir, tags, on_epoch)
    with siblings(count, config.device) as (here, listener, check), shared_threads(count) as threads:
        return _together(here, join.store_of(here, listener), Order(config, run_dir, tags, threads), on_epoch, check)


def check_number(config: Config, here: Place) -> None:
    """Raise a `UserError` if `processes` says another number than have been started."""
    if config.processes not in (None, here.size):
        raise UserError(
            f"processes={config.processes}: {here.by} has started {here.size} processes; {here.size} or null works"
        )


def warn_of_restarts(config: Config) -> None:
    """Warn if torchrun would start again what cannot go on."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and config.resume == "never":
        log.warning(
            "--max-restarts=%s: each restart begins again; with resume=auto and a hydra.run.dir it goes on",
            restarts,
        )


def _together(
    here: Place, store: Store, order: Order, on_epoch: OnEpoch | None, check: Callable[[], None]
) -> list[float]:
    from morphtrain.trainer import train as with_others  # imports torch

    _Others.know = True
    give(store, order, here.size - 1, check)
    seconds = order.config.process_timeout
    with over(here, store, seconds, check), join.joined(here, store, seconds):
        return with_others(order.config, order.run_dir, order.tags, on_epoch)


@contextmanager
def leading() -> Iterator[None]:
    """If the block ends before the others are told what to train, tell them to end, too: as failed if this one has."""
    here = place()
    if here is None:
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        raise  # whoever stops this process stops the others
    except SystemExit as end:
        _dismiss(here, 0 if end.code in (None, 0) else 1)
        raise
    except BaseException:
        _dismiss(here, 1)
        raise
    _dismiss(here, 0)


def _dismiss(here: Place, code: int) -> None:
    if not _Others.know:
        _Others.know = True
        give(_store(here), code, here.size - 1, interrupts.check)


class _Others:
    """Whether the processes that were started with this one know what to do."""

    know = False


_store = functools.cache(join.store_of)  # the store of these processes, for whoever needs it first
