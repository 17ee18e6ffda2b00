"""The connections that torch makes to the other processes, which can be cut: whoever waits there gets an error at once.

Torch can destroy a group of gloo's, but its connections stay open as long as anything refers to them, and nothing ends
a call that waits for a process that will never come.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from morphtrain.processes.line import disown, own

DESCRIPTORS = Path("/dev/fd")
NETWORK = (socket.AF_INET, socket.AF_INET6)


class Connections:
    """Those made within blocks of `noticed`."""

    def __init__(self) -> None:
        self._made: list[socket.socket] = []

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Notice the connections that are made within the block. No other thread may make any meanwhile."""
        before = _sockets()
        yield
        for descriptor in _sockets() - before:
            found = socket.socket(fileno=os.dup(descriptor))  # its own number may come to mean something else
            if found.family not in NETWORK or found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.close()
                continue
            own(found)
            self._made.append(found)

    def cut(self) -> None:
        """End them, at both ends."""
        for one in self._made:
            with suppress(OSError):  # the other end was quicker
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for one in self._made:
            disown(one)
            one.close()
        self._made.clear()


def _sockets() -> set[int]:
    found = set()
    for entry in os.listdir(DESCRIPTORS):
        with suppress(OSError):  # that of the listing itself
            if stat.S_ISSOCK(os.stat(int(entry)).st_mode):
                found.add(int(entry))
    return found


of_group = Connections()
