"""Faults: whatever ends one process of a run ends all of them within seconds, with one message.

A thread in each process holds a line to that of rank 0 (`peers`), and over it each says once a second that it lives and
how far it has come. The system ends the line of a process that dies; one that is stopped falls silent; one that hangs
falls behind. An error, an early end or a signal is told. Rank 0's thread judges: what is certain counts at once, what
may be a consequence of something else only if nothing else is told within a second. Its verdict goes to all, whose
training threads raise it where they would stop for a signal, or in place of torch's error about a broken connection.
Those that do not leave within some seconds are ended by their watching threads. If it is rank 0 that is gone, the
others judge.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from morphtrain import interrupts
from morphtrain.errors import UserError
from morphtrain.processes import verdict
from morphtrain.processes.connections import of_group
from morphtrain.processes.line import Line, disown, own
from morphtrain.processes.peers import START_SECONDS, Messages, Peers, wait_for
from morphtrain.processes.place import Place
from morphtrain.processes.place import place as started_from_outside
from morphtrain.processes.verdict import RankFailed, Report, Whereabouts

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

POLL_SECONDS = 0.1
BEAT_SECONDS = 1.0
SILENT_SECONDS = 60.0  # without a sign of life: no process holds Python's lock for so long
GRACE_SECONDS = 1.0  # in which the cause of something uncertain is told
LEAVE_SECONDS = 10.0  # that a process has to end by itself after the verdict
PACKAGE = str(Path(__file__).parents[1])


@contextmanager
def over(place: Place, store: Store, seconds: float, check: Callable[[], None] = interrupts.check) -> Iterator[None]:
    """Within the block, which all processes enter and leave together, a fault in one of them ends all.

    The group of processes is made inside, and destroyed here once nobody needs it.

    Args:
        seconds: that a process may keep the others waiting.
        check: called while this waits for the others; it raises if they cannot come.

    Raises:
        RankFailed: for any fault, with the message. Rank 0 is to report it, and its own mistakes stay what they are; if
            rank 0 is gone, the first process of each host has reported it.
        Interrupted: in all, after a signal to any.
    """
    from morphtrain import world  # imports torch

    watch = Watch(place, seconds, world.progress)
    try:
        with interrupts.shared(watch.settle), watch.hearing_signals():
            try:
                watch.connect(store, check)
                yield
                watch.part()
            except BaseException as error:
                cause = watch.cause_of(error)
                if cause is error:
                    raise
                raise cause from error
            finally:
                _destroy_group()
    finally:
        watch.close()


class Watch:
    """The thread of a process that watches the others, and what it knows; see the module.

    Args:
        progress: `world.progress`, how far this process has come.
    """

    def __init__(self, place: Place, seconds: float, progress: Any) -> None:
        self.place, self.rank, self.size = place, place.rank, place.size
        self.is_launched = started_from_outside() is not None
        self.seconds = seconds
        self.silent_seconds = min(SILENT_SECONDS, seconds)
        self.progress = progress
        progress.begun, progress.inside, progress.explain = 0, False, self.explain
        self.verdict: Report | None = None
        self._pending: Report | None = None  # what may become it
        self._judge_at = self._leave_by = self._close_by = float("inf")
        self._seen: dict[int, tuple[int, bool]] = {}
        self._still = 0  # beats since anybody has come any further
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._ends = socket.socketpair()  # of a line from the handler of signals
        self.peers = Peers(place, self._selector, self._greet, self._take, self._lose)
        self._trainer = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    # The thread that trains.

    @contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """Let the watch know of a signal when it comes: Python's handler waits for the end of what torch is doing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        end, of_handler = self._ends
        for one in self._ends:
            one.setblocking(False)
            own(one)
        self._selector.register(end, selectors.EVENT_READ, self._signalled)
        before = signal.set_wakeup_fd(of_handler.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)

    def connect(self, store: Store, check: Callable[[], None] = interrupts.check) -> None:
        """Connect all processes; `check` is called meanwhile.

        Raises:
            RankFailed: if one does not come in time.
        """
        if self.rank == 0:
            self.peers.listen(store)
        else:
            self.peers.connect(store)
        self._thread.start()
        wait_for(lambda: self.peers.have_come, START_SECONDS, self._miss, check)

    def settle(self, number: int) -> None:
        """Agree with the others on why they end, this process because of a signal."""
        self._settled(Report(verdict.INTERRUPTED, self.rank, number=number))

    def explain(self, error: RuntimeError) -> None:
        """Raise what has caused an error in a function that all processes call; return if no other process has."""
        found = self._settled(Report(verdict.LOST, self.rank, str(error).splitlines()[0]))
        if found is None:
            return
        if found.kind == verdict.INTERRUPTED:
            raise interrupts.Interrupted(found.number)
        raise self._failure(found)

    def part(self) -> None:
        """Leave in order, once all are about to."""
        self.progress.begun += 1
        self.progress.inside = self.rank == 0  # the others wait for it as long as it takes to finish
        self.peers.tell(parting=True)
        wait_for(lambda: all(peer.has_left for peer in self.peers.values()))

    def cause_of(self, error: BaseException) -> BaseException:
        """What to raise instead of an error that ends this process, or the error itself."""
        report = verdict.of_error(self.rank, error)
        found = self._settled(report)
        _destroy_group()
        if self.rank == 0:
            return self._cause_in_first(error, found or report)
        self._outlast_first()
        if (found or report).kind == verdict.INTERRUPTED:
            return _interruption(error, found or report)
        failure = self._failure(found or report)
        if found is not None and self.peers:
            self._say(found)
        elif self.peers or isinstance(error, UserError):  # rank 0 has left in order, or cannot be reached
            _tell(failure)  # where rank 0 has ended before all had come, it has said why
        return failure

    def _cause_in_first(self, error: BaseException, found: Report) -> BaseException:
        if found.kind == verdict.INTERRUPTED:
            return _interruption(error, found)
        is_mistake = found.kind == verdict.MISTAKE and isinstance(error, (UserError, OSError))  # the same as elsewhere
        return error if is_mistake else self._failure(found)

    def close(self) -> None:
        """End the thread and the lines, after what has been sent over them has arrived."""
        self.progress.explain = None
        with self._lock:
            self._leave_by, self._close_by = float("inf"), time.monotonic() + GRACE_SECONDS
            self.peers.end()
        if self._thread.ident is not None:
            self._thread.join()
        self.peers.close()
        for end in self._ends:
            disown(end)
            end.close()
        self._selector.close()

    def _settled(self, report: Report) -> Report | None:
        """The verdict, after what this process reports; None if there is nobody left who gives one."""
        self._hear(report)
        end = time.monotonic() + 3 * GRACE_SECONDS
        while self.verdict is None and time.monotonic() < end and self._is_judged():  # no Event: handlers wait, too
            time.sleep(POLL_SECONDS / 10)
        return self.verdict

    def _is_judged(self) -> bool:
        """Whether there is a thread that gives a verdict, here or in rank 0."""
        return self._thread.is_alive() and (self.rank == 0 or not self.peers[0].has_left)

    def _miss(self) -> None:
        """Report the first process that has not come."""
        absent = self.peers.absent() if self.rank == 0 else [0]
        self._hear(Report(verdict.MISSING, absent[0], seconds=START_SECONDS))

    def _outlast_first(self) -> None:
        """Wait until rank 0 has left, so that no launcher takes the end of this process for the first."""
        self._leave_by = float("inf")
        end = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < end and any(not peer.is_gone for peer in self.peers.values()):
            time.sleep(POLL_SECONDS / 2)

    # The thread that watches.

    def _run(self) -> None:
        next_beat = time.monotonic()
        while not self._is_over():
            for key, _ in self._selector.select(POLL_SECONDS):
                with self._lock:
                    key.data()
            with self._lock:
                now = time.monotonic()
                if now >= next_beat:
                    next_beat = now + BEAT_SECONDS
                    self._beat()
                if self._pending is not None and self.verdict is None and now >= self._judge_at:
                    self._decide(self._pending)
                if now >= self._leave_by:
                    self._end_by_force()

    def _is_over(self) -> bool:
        """Whether this process is done, and the others have read what it has told them."""
        done = self._close_by < float("inf")
        return done and (time.monotonic() > self._close_by or all(peer.is_gone for peer in self.peers.values()))

    def _signalled(self) -> None:
        """Tell the others of a signal at once: the thread that trains may be waiting for them, and does not see it."""
        for number in self._ends[0].recv(64):
            if interrupts.is_ours(number):
                self._hear(Report(verdict.INTERRUPTED, self.rank, number=number))

    def _beat(self) -> None:
        """Say that this process lives, and see who is late. After a pause of this process nobody is."""
        self.peers.tell(beat=[self.progress.begun, self.progress.inside, self._where()])
        for rank, peer in self.peers.items():
            peer.silent += 1
            if peer.silent * BEAT_SECONDS > self.silent_seconds and not peer.has_left:
                self._hear(Report(verdict.SILENT, rank, seconds=self.silent_seconds))
        if self.rank == 0 and self.peers.have_come:
            self._look_for_the_late()

    def _look_for_the_late(self) -> None:
        """Report the process that has kept others waiting for too long: that which has come least far."""
        seen = {rank: (peer.begun, peer.inside) for rank, peer in self.peers.items()}
        seen[0] = (self.progress.begun, self.progress.inside)
        if seen != self._seen:
            self._seen, self._still = seen, 0
            return
        self._still += 1
        is_awaited = any(inside for _, inside in seen.values()) or len({begun for begun, _ in seen.values()}) > 1
        if self._still * BEAT_SECONDS < self.seconds or not is_awaited:
            return
        last = min(seen, key=lambda rank: (*seen[rank], rank))
        kind = verdict.STALLED if seen[last] == max(seen.values()) else verdict.HUNG
        where = self.peers[last].where if last else self._where()
        self._hear(Report(kind, last, where, seconds=self.seconds))

    def _where(self) -> str:
        """Where the thread that trains is: the innermost line of this package."""
        frame = innermost = sys._current_frames().get(self._trainer)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        found = frame or innermost
        if found is None:
            return "no code at all"
        file = os.path.relpath(found.f_code.co_filename, os.path.dirname(PACKAGE))
        return f"{found.f_code.co_name} ({file}, line {found.f_lineno})"

    def _greet(self, line: Line) -> None:
        """Tell a process that has just come, if it is too late."""
        if self.verdict is not None:
            line.send(verdict=asdict(self.verdict))

    def _take(self, rank: int, messages: Messages) -> None:
        """Act on what a process has said."""
        peer = self.peers[rank]
        for message in messages:
            peer.silent = 0
            if "beat" in message:
                peer.begun, peer.inside, peer.where = message["beat"]
            elif "parting" in message:
                peer.has_left = True
            elif "report" in message:
                self._hear(Report(**message["report"]))
            elif "verdict" in message:
                self._adopt(Report(**message["verdict"]))

    def _lose(self, rank: int) -> None:
        """Report a process whose line has ended, unless it has said before that it is about to leave."""
        peer = self.peers[rank]
        left_in_order, peer.has_left, peer.is_gone = peer.has_left, True, True
        if not left_in_order:
            self._hear(Report(verdict.DIED, rank))

    # Judging.

    def _hear(self, report: Report) -> None:
        """Take a report to whoever judges: rank 0 or, if it is about that, whoever has noticed."""
        with self._lock:
            if self.verdict is not None:
                return
            first = self.peers.get(0)
            if first is not None and not first.has_left and report.rank != 0:
                first.line.send(report=asdict(report))
            elif report.is_certain:
                self._decide(report)
            elif self.rank == 0 and report.likelier(self._pending):
                self._judge_at = min(self._judge_at, time.monotonic() + GRACE_SECONDS)
                self._pending = report

    def _decide(self, report: Report) -> None:
        """Make a report the verdict, here and in those that this process has a line to."""
        self._adopt(report)
        self.peers.tell(verdict=asdict(report))

    def _adopt(self, report: Report) -> None:
        """Take a verdict as final, and let the thread that trains know."""
        if self.verdict is not None:
            return
        self.verdict = report
        is_own = report.rank == self.rank and report.kind in verdict.TOLD
        if report.kind == verdict.INTERRUPTED:
            interrupts.tell(report.number)
        else:
            interrupts.fail(None if is_own else self._failure(report), self.is_launched)
        hangs = report.kind == verdict.HUNG and report.rank == self.rank
        of_group.cut()  # whoever waits for another process gets an error, and `explain` its cause
        self._leave_by = time.monotonic() + (GRACE_SECONDS if hangs else LEAVE_SECONDS)
        if report.kind == verdict.SILENT:
            self._kill(self.peers.everyone[report.rank])

    def _failure(self, report: Report) -> RankFailed:
        return RankFailed(report.message(self.peers.everyone[report.rank]))

    def _kill(self, there: Whereabouts | None) -> None:
        """End a process of this host that is stopped; nobody else may."""
        if there is not None and there.is_beside(self.peers.here):
            with suppress(ProcessLookupError):
                os.kill(there.pid, signal.SIGKILL)

    def _say(self, report: Report) -> None:
        """Say why all processes end, if that falls to this one: to rank 0 or, if it is gone, to the first of each host.

        Not through logging, or what else may wait for a lock: this may be the last that the process does.
        """
        first_is_gone = report.rank == 0 and report.kind in (verdict.DIED, verdict.SILENT)
        beside = [rank for rank, there in enumerate(self.peers.everyone) if there and there.is_beside(self.peers.here)]
        if self.rank == (min(rank for rank in beside if rank > 0) if first_is_gone else 0):
            _tell(self._failure(report))

    def _end_by_force(self) -> NoReturn:
        """End this process, whose thread that trains has not left."""
        assert self.verdict is not None
        if self.verdict.kind != verdict.INTERRUPTED:
            self._say(self.verdict)
            os._exit(1)
        if self.rank == 0:
            _tell(f"interrupted, and ended by force; {verdict.RESUME}")
        os._exit(128 + self.verdict.number)


def _tell(text: object) -> None:
    """Write a line to the terminal; if nobody reads it any more, the process has to end all the same."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def _interruption(error: BaseException, found: Report) -> BaseException:
    return error if isinstance(error, KeyboardInterrupt) else interrupts.Interrupted(found.number)


def _destroy_group() -> None:
    """Close this process's connections of torch, so that no other waits for it."""
    from torch import distributed

    of_group.close()
    if distributed.is_initialized():
        distributed.destroy_process_group()
