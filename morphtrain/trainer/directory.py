"""A run directory belongs to one process at a time."""

from __future__ import annotations

import errno
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from morphtrain.errors import UserError
from morphtrain.files import named_lock, remove_left_over

LOCK = ".run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

log = logging.getLogger(__name__)


@contextmanager
def occupied(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of `run_dir`, and remove what a killed one has left half-written.

    The lock ends with the process, however it ends. On a file system without locks there is a warning instead.

    Raises:
        UserError: if another process has the directory, naming it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(named_lock(run_dir / LOCK, f"process {os.getpid()} on {platform.node()}"))
        except BlockingIOError:
            held = f"{_holder(run_dir)} is training in it; wait for its end, or choose another directory"
            raise UserError(f"{as_typed(run_dir)}: {held}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s: its file system has no locks; let no second process train in it", run_dir)
        else:
            remove_left_over(run_dir)
        yield


def as_typed(run_dir: Path) -> str:
    """The key that chose this directory, with its value: of a job, the directory of its multirun."""
    settings = HydraConfig.get() if HydraConfig.initialized() else None
    if settings is not None and settings.mode == RunMode.MULTIRUN:
        return f"hydra.sweep.dir={settings.sweep.dir}"
    return f"hydra.run.dir={run_dir}"


def _holder(run_dir: Path) -> str:
    with suppress(OSError):
        if text := (run_dir / LOCK).read_text():
            return text
    return "another process"
