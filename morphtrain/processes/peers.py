"""The other processes as one of them sees them: how the lines to them come about, and what is known of each.

Rank 0 listens at a port that it writes into the store, with a secret that whoever connects has to say. The others
connect and say where they are; once all have, rank 0 tells it to everyone. So rank 0 has a line to every other process,
and each of those has a single one, to rank 0. What is said over the lines afterwards is up to the watch (`watch`).
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import time
from collections import UserDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from morphtrain import interrupts
from morphtrain.errors import UserError
from morphtrain.processes import verdict
from morphtrain.processes.line import Line, disown, own
from morphtrain.processes.place import LOCALHOST, Place
from morphtrain.processes.verdict import Report, Whereabouts

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

KEY = "watch"  # in the store: the port at which rank 0 listens, and what to say there
START_SECONDS = 300.0  # that a process has to come
CONNECT_SECONDS = 10.0  # that rank 0 has to answer
POLL_SECONDS = 0.05

Messages = list[dict[str, Any]]


@dataclass
class Peer:
    """Another process, as this one sees it."""

    line: Line
    begun: int = 0  # calls of functions that all have to call
    inside: bool = False
    where: str = ""
    silent: int = 0  # beats of this process since the last sign of life
    has_left: bool = False  # it is about to, in order, or it has
    is_gone: bool = False  # its line has ended


class Peers(UserDict[int, Peer]):
    """Those that this process has a line to, by rank: in rank 0 all others that have come, in another one rank 0.

    Args:
        selector: calls what is registered with a line when there is something to read.
        greet: called with the line of a process that has just come.
        take: called with a rank and what it has said.
        lose: called with a rank whose line has ended.
    """

    def __init__(
        self,
        place: Place,
        selector: selectors.BaseSelector,
        greet: Callable[[Line], None],
        take: Callable[[int, Messages], None],
        lose: Callable[[int], None],
    ) -> None:
        super().__init__()
        self.here = Whereabouts.own()
        self.everyone: list[Whereabouts | None] = [None] * place.size  # None: not known yet
        self.everyone[place.rank] = self.here
        self.have_come = False  # everyone has come
        self._place = place
        self._selector = selector
        self._greet, self._take, self._lose = greet, take, lose
        self._listener: socket.socket | None = None

    def listen(self, store: Store) -> None:
        """In rank 0: let the others connect, from now on."""
        host = LOCALHOST if self._place.one_host else ""  # not the address of torchrun's store, which may be public
        both = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, dualstack_ipv6=both)
        self._listener.setblocking(False)
        own(self._listener)
        token = secrets.token_hex()
        self._selector.register(self._listener, selectors.EVENT_READ, lambda: self._accept(token))
        store.set(KEY, json.dumps([self._listener.getsockname()[1], token]))

    def connect(self, store: Store) -> None:
        """In another process: connect to rank 0, once it listens.

        Raises:
            UserError: if it does not in time, or cannot be reached.
        """
        wait_for(lambda: store.check([KEY]), START_SECONDS, _never_came)
        port, token = json.loads(store.get(KEY))
        address = LOCALHOST if self._place.one_host else self._place.address
        try:
            line = Line(socket.create_connection((address, port), timeout=CONNECT_SECONDS))
        except OSError as error:
            where = f"{address}, port {port}"
            hint = "its host has to let those of the others in, at any port"
            raise UserError(f"rank 0 cannot be reached at {where} ({error.strerror or error}); {hint}") from error
        line.send(token=token, rank=self._place.rank, whereabouts=asdict(self.here))
        self._add(0, line)

    def absent(self) -> list[int]:
        """In rank 0: the ranks of those that have not come."""
        return [rank for rank in range(1, self._place.size) if rank not in self]

    def tell(self, **message: Any) -> None:
        """Send a message to each."""
        for peer in self.values():
            peer.line.send(**message)

    def end(self) -> None:
        """Say no more; what was said still arrives."""
        for peer in self.values():
            peer.line.end()

    def close(self) -> None:
        for peer in self.values():
            peer.line.close()
        if self._listener is not None:
            disown(self._listener)
            self._listener.close()

    def _accept(self, token: str) -> None:
        assert self._listener is not None
        try:
            line = Line(self._listener.accept()[0])
        except OSError:  # whoever it was has gone again
            return
        self._selector.register(line, selectors.EVENT_READ, lambda: self._admit(line, token))

    def _admit(self, line: Line, token: str) -> None:
        """Read from somebody who is not known yet."""
        try:
            messages = line.receive()
        except EOFError:
            messages = [{}]
        if not messages:
            return
        self._selector.unregister(line)
        if not secrets.compare_digest(str(messages[0].get("token")).encode("utf-8", "replace"), token.encode()):
            line.close()
            return
        rank = messages[0]["rank"]
        self.everyone[rank] = Whereabouts(**messages[0]["whereabouts"])
        self._add(rank, line)
        self._greet(line)
        if not self.absent():
            self.tell(everyone=[asdict(there) for there in self.everyone if there is not None])
            self.have_come = True
        self._take(rank, messages[1:])

    def _add(self, rank: int, line: Line) -> None:
        self[rank] = Peer(line)
        self._selector.register(line, selectors.EVENT_READ, lambda: self._read(rank))

    def _read(self, rank: int) -> None:
        line = self[rank].line
        try:
            messages = line.receive()
        except EOFError:
            self._selector.unregister(line)
            self._lose(rank)
            return
        for message in messages:
            if "everyone" in message:
                self.everyone = [Whereabouts(**there) for there in message["everyone"]]
                self.have_come = True
        self._take(rank, messages)


def wait_for(
    condition: Callable[[], bool],
    seconds: float = float("inf"),
    too_late: Callable[[], None] | None = None,
    check: Callable[[], None] = interrupts.check,
) -> None:
    """Wait until a condition holds; raises a failure or a signal meanwhile.

    Args:
        too_late: called again and again after so many seconds.
        check: called meanwhile; it raises if the condition cannot come to hold.
    """
    end = time.monotonic() + seconds
    while not condition():
        check()
        if too_late is not None and time.monotonic() > end:
            too_late()
        interrupts.wait(POLL_SECONDS)


def _never_came() -> NoReturn:
    raise UserError(Report(verdict.MISSING, 0, seconds=START_SECONDS).message(None))
