"""`processes=N`: this process starts N - 1 others on its host, and ends them whatever happens."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from morphtrain import schema
from morphtrain.processes import join
from morphtrain.processes.place import LOCALHOST, Place
from morphtrain.processes.verdict import RankFailed
from morphtrain.timing.cores import allowed_cores

GRACE_SECONDS = 10.0  # that the others have to end by themselves after the run
THREADS = "OMP_NUM_THREADS"

log = logging.getLogger(__name__)


class Siblings:
    """The other processes of a run, which this one has started."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            self.processes.extend(map(_start, places))
        except BaseException:
            self.end()
            raise

    def check(self) -> None:
        """Raise `RankFailed` if one of them has ended."""
        for rank, process in enumerate(self.processes, 1):
            if process.poll() is not None:
                raise RankFailed(f"rank {rank} of {len(self.processes) + 1} has ended with code {process.returncode}")

    def wait(self) -> None:
        """Let them end by themselves, as they do after the last epoch."""
        end = time.monotonic() + GRACE_SECONDS
        while any(process.poll() is None for process in self.processes) and time.monotonic() < end:
            time.sleep(0.01)

    def end(self) -> None:
        """End those that are left, each with the workers that it has."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


@contextmanager
def siblings(count: int, device: str) -> Iterator[tuple[Place, join.Listener, Callable[[], None]]]:
    """Start `count` - 1 further processes, which follow this one and end with the block.

    They have its interpreter, environment, modules and error output.

    Args:
        device: config key `device`.

    Yields:
        The place of this process, the socket for its store, and what raises if one of the others has ended.

    Raises:
        UserError: if this host has fewer GPUs.
    """
    _check(count, device)
    listener = join.listening()
    port = listener.getsockname()[1]
    here, *others = [Place(rank, count, rank, count, LOCALHOST, port) for rank in range(count)]
    with listener:
        started = Siblings(others)
        try:
            yield here, listener, started.check
            started.wait()
        finally:
            started.end()


def _check(count: int, device: str) -> None:
    """Raise a `UserError` for more processes than GPUs; warn of more than cores."""
    from morphtrain.trainer.devices import possible_devices  # imports torch

    devices = possible_devices(device)
    if devices[0].type != "cpu":
        wanted = f"at most {len(devices)}, the number of GPUs for device={device}; any number works with device=cpu"
        schema.check(count <= len(devices), "processes", count, wanted)
    elif count > (cores := len(allowed_cores())):
        log.warning("processes=%d: they share %d cores, and one process may be faster", count, cores)


def _start(place: Place) -> subprocess.Popen[bytes]:
    """Start a process that follows; it ends when its standard input does, which is when this process has ended."""
    environment = {**os.environ, **place.environment(), "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-m", "morphtrain.processes"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is meant for the run, which ends the others
    )


def end_with_parent() -> None:
    """In a process that `siblings` has started: end after the process that started it, however that ends.

    The watch ends it sooner, with a message; this is for what comes before and after that.
    """

    def wait() -> None:
        # Not through sys.stdin: a process that is forked meanwhile, as those that read images are, would find it locked
        # by a thread that it does not have, and wait forever where it closes it.
        while os.read(0, 1):
            pass
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def shared_threads(count: int) -> Iterator[int | None]:
    """Within the block, torch has this process's share of its threads among `count`, which the block is given.

    None, and as many threads as before, if OMP_NUM_THREADS says how many a process has.
    """
    import torch

    if THREADS in os.environ:
        yield None
        return
    before = torch.get_num_threads()
    share = max(1, before // count)
    torch.set_num_threads(share)
    try:
        yield share
    finally:
        torch.set_num_threads(before)
