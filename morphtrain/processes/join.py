"""The store in which the processes of a run meet, and the group that they form."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from morphtrain.errors import UserError
from morphtrain.processes import network
from morphtrain.processes.connections import of_group
from morphtrain.processes.place import LOCALHOST, Place

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

TIMEOUT = timedelta(minutes=10)  # that one process waits for another


Listener = socket.socket


def listening(port: int = 0) -> Listener:
    """A socket for a store that only this host can reach; port 0: any that is free.

    Raises:
        UserError: if the port is in use.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOCALHOST, port))
    except OSError as error:
        listener.close()
        raise UserError(f"MASTER_PORT={port}: {error.strerror}; that of another free port works") from error
    return listener


def store_of(place: Place, listener: Listener | None = None) -> Store:
    """The store of this attempt: rank 0 or torchrun keeps it, and a process that is early waits for it.

    After a restart nothing that was left by the attempt before is found in it.

    Args:
        listener: of rank 0, the socket on which it keeps the store; None: made by this.
    """
    from torch._C._distributed_c10d import TCPStore  # slow to import
    from torch.distributed.distributed_c10d import PrefixStore

    keeps = place.rank == 0 and not place.agent
    if keeps and place.one_host and listener is None:
        listener = listening(place.port)
    store = TCPStore(
        place.address,
        place.port,
        place.size,
        keeps,
        TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    return PrefixStore(f"morphtrain {place.attempt}", store)


@contextmanager
def joined(place: Place, store: Store, seconds: float) -> Iterator[None]:
    """Within the block, the processes are the group that `morphtrain.world` speaks of; all of them have to come.

    Objects and tensors in memory are sent by gloo, tensors on CUDA devices by NCCL. On a single host, gloo listens to
    nothing else. The watch around the block (`watch.over`) destroys the group, once nobody needs it.

    Args:
        seconds: that a process may keep the others waiting, before the watch ends them; torch waits twice as long.

    Raises:
        UserError: in all processes, if those of several hosts do not reach each other.
    """
    from torch import cuda, distributed  # slow to import
    from torch.distributed.distributed_c10d import PrefixStore

    from morphtrain import world

    backend = "cpu:gloo,cuda:nccl" if cuda.is_available() else "gloo"
    network_store = PrefixStore("network", store)
    reached = _loopback() if place.one_host else network.checked(place.rank, place.size, network_store)
    with reached, of_group.noticed():
        distributed.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=2 * seconds),
        )
    before, world.local = world.local, world.Local(place.local_rank, place.local_size)
    try:
        yield
    finally:
        world.local = before


@contextmanager
def _loopback() -> Iterator[None]:
    """Let gloo use the interface of this host to itself, unless another one is named."""
    if network.INTERFACE in os.environ:
        yield
        return
    os.environ[network.INTERFACE] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    try:
        yield
    finally:
        del os.environ[network.INTERFACE]
