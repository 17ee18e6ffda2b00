"""SIGINT, SIGTERM and SIGHUP: they set a flag, which is raised where a run or a sweep can stop.

An exception raised by the handler itself can come in the middle of a transaction, whose lock then stays, or inside a
callback of a library that swallows it. So whoever can stop asks: between steps, batches, trials, and while waiting.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
SAME_SECONDS = 0.5  # `timeout` signals its child twice at once: that is one wish to stop, not two
POLL_SECONDS = 0.05


class Interrupted(KeyboardInterrupt):
    """A signal has told this process to stop; `exit_code` is what a shell expects then."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = 128 + number


class JobInterrupted(Exception):
    """`Interrupted` in a worker process of a sweep, in a form that a launcher passes on like any other failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.exit_code = 128 + number

    def __str__(self) -> str:
        return f"ended by {signal.Signals(self.number).name}"


class _State:
    """What this process has been told."""

    number: int | None = None  # the first signal since somebody has deferred them
    since = 0.0
    depth = 0  # blocks of `deferred` around
    owned = False  # the process is ours: a command, which may end it
    parent: int | None = None  # of a worker: the process of its sweep
    settle: Callable[[int], None] | None = None  # of one that trains with others: agrees with them on why they end
    failure: Exception | None = None  # of another of them
    deaf = False  # they have failed, and their launcher ends what is left of them


_state = _State()


@contextmanager
def deferred() -> Iterator[None]:
    """Within the block, signals set the flag that `check` raises; one that nobody has asked for is raised at the end.

    A second signal, half a second later, does what it would do without this block. Signals that somebody else handles
    or ignores stay his, and outside of the main thread nothing is changed.

    Raises:
        Interrupted: at the end of the outermost block, after a signal; also in place of an error after it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.depth += 1
    try:
        with _handled_by(_note):
            yield
    except Exception as error:
        if (number := _left_over()) is not None:
            raise Interrupted(number) from error
        raise
    except BaseException:
        _left_over()
        raise
    if (number := _left_over()) is not None:
        raise Interrupted(number)


@contextmanager
def command() -> Iterator[None]:
    """Like `deferred`, in a process that is ours: a second signal, and one within `at_once`, ends it there and then."""
    _state.owned = True
    try:
        with _handled_by(_end), deferred():
            yield
    finally:
        _state.owned = False


@contextmanager
def at_once() -> Iterator[None]:
    """A block with nothing to lose, in which a signal ends the process of a command without waiting for `check`."""
    check()
    if not _state.owned or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled_by(_end):
        yield


def become_worker() -> None:
    """Let signals set the flag for the rest of this process, a worker of a sweep, which also stops without its sweep.

    However many signals come, one sets the flag: a launcher's workers get those of their process group, too.
    """
    if _state.parent is None and threading.current_thread() is threading.main_thread():
        _state.parent = os.getppid()
        for number in _ours():
            signal.signal(number, _note)


def is_worker() -> bool:
    """Whether this process is a worker of a sweep."""
    return _state.parent is not None


@contextmanager
def shared(settle: Callable[[int], None]) -> Iterator[None]:
    """A block in which this process trains together with others, which may be interrupted or fail.

    Args:
        settle: called with a signal before it is raised or ends the process: it tells the others, waits for what they
            know, and may call `fail`.
    """
    _state.settle = settle
    try:
        yield
    finally:
        _state.settle = _state.failure = None
        if not _state.depth:
            _state.number = None  # set by `tell`, and nobody has asked


def tell(number: int) -> None:
    """Set the flag for a signal that another of several processes has had."""
    if _state.number is None:
        _state.number, _state.since = number, math.inf  # the same one may come here too, and is no second one


def fail(error: Exception | None, ended_from_outside: bool) -> None:
    """Let `check` raise the failure of another of several processes.

    Args:
        error: None: the failure is this process's own, which has raised it already.
        ended_from_outside: whether a launcher now ends what is left of them: its signal is not the user's.
    """
    _state.failure = error
    if ended_from_outside:
        _state.deaf, _state.number = True, None


def is_ours(number: int) -> bool:
    """Whether a signal sets the flag, or ends the process, by this module."""
    return signal.getsignal(number) in (_note, _end)


def check() -> None:
    """Raise the flag.

    Raises:
        Interrupted: after a signal, or in a worker whose sweep has ended.
        Exception: the failure of another of several processes, which comes first.
    """
    number = _state.number
    if number is not None and _state.failure is None and _state.settle is not None:
        _state.settle(number)
    if _state.failure is not None:
        raise _state.failure
    if number is not None:
        raise Interrupted(number)
    if _state.parent is not None and os.getppid() != _state.parent:
        raise Interrupted(signal.SIGTERM)


def wait(seconds: float) -> None:
    """Sleep; raises `Interrupted` soon after a signal."""
    end = time.monotonic() + seconds
    check()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, POLL_SECONDS))
        check()


def leave(exit_code: int) -> None:
    """End a command that was interrupted, without the seconds that Python takes to unload torch and MLflow."""
    for child in multiprocessing.active_children():
        if not child.daemon and child.pid is not None:  # a launcher's worker, whose job has ended
            os.kill(child.pid, signal.SIGKILL)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def leave_group() -> None:
    """Keep signals to the process group, such as those of Ctrl-C, from this helper process: its parent ends it."""
    os.setpgid(0, 0)


def _left_over() -> int | None:
    """End a block of `deferred`; the signal that is left at the end of the outermost one, None if there is none."""
    _state.depth -= 1
    if _state.depth:
        return None
    number = _state.number
    if _state.parent is None:  # a worker has no use for another job
        _state.number = None
    return number


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _ours()}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)


def _ours() -> list[signal.Signals]:
    """The signals that nobody else handles or ignores."""
    return [number for number in SIGNALS if signal.getsignal(number) in (*DEFAULTS, _note, _end)]


def _note(number: int, frame: FrameType | None) -> None:
    """The handler that sets the flag."""
    if _state.deaf:
        return
    if _state.number is None:
        _state.number, _state.since = number, time.monotonic()
        if _state.owned:
            _pass_on()
    elif _state.parent is None and time.monotonic() - _state.since > SAME_SECONDS:
        _end(number, frame)


def _pass_on() -> None:
    """Tell the worker processes of a launcher; daemons are helpers of this process, which ends them itself."""
    for child in multiprocessing.active_children():
        if not child.daemon and child.pid is not None:
            os.kill(child.pid, signal.SIGTERM)


def _end(number: int, frame: FrameType | None) -> None:
    """The handler that ends a process of ours; otherwise it does what Python would have done."""
    if _state.settle is not None:
        _state.settle(number)
    if _state.deaf:
        return
    if _state.owned:
        os._exit(128 + number)
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.raise_signal(number)


def _forget_others() -> None:
    """A forked child, such as a loader's worker, trains with no others."""
    _state.settle = _state.failure = None


os.register_at_fork(after_in_child=_forget_others)
