"""A line between two processes, over which both send messages: objects of JSON, each of one line of text."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from contextlib import suppress
from typing import Any

SEND_SECONDS = 1.0  # for a message; whoever does not take it by then is stopped, and others will say so
MOST_BYTES = 2**20  # of a message; longer ones are not ours


class Line:
    """One end of a connection; any thread may send, and one reads."""

    def __init__(self, peer: socket.socket) -> None:
        peer.settimeout(SEND_SECONDS)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own(peer)
        self._socket = peer
        self._unread = b""
        self._sending = threading.RLock()  # a signal's handler may send while its thread is sending

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Send a message; that it does not arrive is no error here: the other end is gone, and `receive` says so."""
        with self._sending, suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come, once there is something to read.

        Raises:
            EOFError: if the other end has closed the line, or sends what is no message.
        """
        try:
            read = self._socket.recv(2**16)
        except TimeoutError:
            return []
        except OSError as error:
            raise EOFError from error
        *lines, self._unread = (self._unread + read).split(b"\n")
        if not read or len(self._unread) > MOST_BYTES:
            raise EOFError
        return [_message(line) for line in lines]

    def end(self) -> None:
        """Send no more; what was sent still arrives."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        disown(self._socket)
        self._socket.close()


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, or brackets within brackets without end
        raise EOFError from error
    if not isinstance(message, dict):
        raise EOFError
    return message


def own(end: socket.socket) -> None:
    """Close a socket in the children that this process forks, where it would outlive this process."""
    _owned.add(end)


def disown(end: socket.socket) -> None:
    """Forget a socket that is about to be closed."""
    _owned.discard(end)


def _close_in_child() -> None:
    if not _owned:
        return
    with suppress(ValueError):  # outside of the main thread
        signal.set_wakeup_fd(-1)  # or signals of the child would be told to its parent
    for end in _owned:
        os.close(end.detach())
    _owned.clear()


_owned: set[socket.socket] = set()
os.register_at_fork(after_in_child=_close_in_child)
