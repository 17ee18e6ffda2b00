"""Whether the processes of several hosts can reach each other, told in one line before they try to form a group.

gloo listens at the address of the interface GLOO_SOCKET_IFNAME or, without it, at the one that the host's name resolves
to: on many systems 127.0.0.1, which no other host reaches. Its own error comes late and does not say so.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from morphtrain.errors import UserError, first_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

INTERFACE, FOR_GPUS = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
SECONDS = 10.0  # that a process tries to reach another, once both are there
GET_ADDRESS = 0x8915  # SIOCGIFADDR, see netdevice(7)
BOOT, NETWORK = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/net"


@dataclass(frozen=True)
class End:
    """Where a process will listen.

    Args:
        network: the same for processes that reach each other at 127.0.0.1, and for no others.
        host: the name of its host.
        address: that gloo will take there; "" if it finds none.
        interfaces: the names of those that other hosts may reach, with their addresses.
        wanted: GLOO_SOCKET_IFNAME there; "" if it is not set.
        port: of the socket that is open for others to try.
    """

    network: str
    host: str
    address: str
    interfaces: dict[str, str]
    wanted: str
    port: int = 0

    @property
    def is_loopback(self) -> bool:
        """Whether no other host can reach it."""
        return ipaddress.ip_address(self.address.partition("%")[0]).is_loopback


@contextmanager
def checked(rank: int, size: int, store: Store) -> Iterator[None]:
    """A block in which processes form a group, if they can reach each other.

    Raises:
        UserError: in all of them, naming GLOO_SOCKET_IFNAME and the interfaces: some `SECONDS` after the last of them
            has come, or if the group cannot be formed. Other systems than Linux are not checked.
    """
    if sys.platform != "linux":
        yield
        return
    ends = check(here(), rank, size, store)
    try:
        yield
    except RuntimeError as error:
        why = f"the processes could not form a group ({first_line(error)})"
        raise UserError(f"{INTERFACE}: {why}; {_advice(ends)}") from error


def here() -> End:
    """This process's end."""
    wanted = os.environ.get(INTERFACE, "")
    own = {name: address for _, name in socket.if_nameindex() if (address := _address(name))}
    first = wanted.partition(",")[0]  # of several, between which gloo spreads its connections
    address = own.get(first, "") if wanted else _resolved(socket.gethostname())
    outward = {name: found for name, found in own.items() if not ipaddress.ip_address(found).is_loopback}
    return End(_network(), socket.gethostname(), address, outward, wanted)


def check(end: End, rank: int, size: int, store: Store) -> list[End]:
    """The ends of all processes, by rank, each of which has been reached from another host; errors as in `checked`."""
    with _listening(end.address) as listener:
        port = listener.getsockname()[1] if listener else 0
        store.set(f"end {rank}", json.dumps(asdict(end) | {"port": port}))
        ends = [End(**json.loads(store.get(f"end {other}"))) for other in range(size)]
        store.set(f"problem {rank}", _problem(ends, rank))
        problems = [store.get(f"problem {other}").decode() for other in range(size)]
    for problem in filter(None, problems):
        raise UserError(f"{INTERFACE}{problem}; {_advice(ends)}")
    return ends


def _problem(ends: list[End], rank: int) -> str:
    """Why a process cannot be reached from the next one, in words that follow GLOO_SOCKET_IFNAME; "" if it can."""
    end = ends[rank]
    if not end.address:
        return f"={end.wanted}: there is no such interface with an address on rank {rank}'s host, {end.host}"
    if all(other.network == end.network for other in ends):
        return ""
    if end.is_loopback:
        named = f" is not set, and the name of rank {rank}'s host, {end.host}, stands for"
        return f"{f'={end.wanted} is' if end.wanted else named} {end.address}, which no other host reaches"
    number = (rank + 1) % len(ends)
    other = ends[number]
    if other.network == end.network or not other.address or other.is_loopback:
        return ""
    try:
        socket.create_connection((other.address, other.port), timeout=SECONDS).close()
    except OSError as error:
        set_to = f"={other.wanted}" if other.wanted else ""
        place = f"rank {number} at {other.address} ({other.host})"
        return f"{set_to}: rank {rank} on {end.host} cannot reach {place} within {SECONDS:g} s ({_words(error)})"
    return ""


def _advice(ends: list[End]) -> str:
    """What to set, with the interfaces of all hosts."""
    hosts = {end.network: end for end in ends}.values()
    found = " and ".join(f"{_names(end.interfaces)} on {end.host}" for end in hosts)
    what = f"set {INTERFACE} (and {FOR_GPUS} for GPUs) on every host to its interface that the others reach"
    return f"{what}; there is {found}"


def _names(interfaces: dict[str, str]) -> str:
    return ", ".join(f"{name} ({address})" for name, address in interfaces.items()) or "none but the loopback"


def _words(error: OSError) -> str:
    """The system's words for an error."""
    return error.strerror or str(error)


@contextmanager
def _listening(address: str) -> Iterator[socket.socket | None]:
    """A socket at any free port of `address` that others can connect to; None without an address."""
    if not address:
        yield None
        return
    with socket.create_server((address, 0), family=_family(address), backlog=128) as listener:
        yield listener


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _address(interface: str) -> str:
    """The IPv4 address of an interface of this host; "" if it has none."""
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            answer = fcntl.ioctl(asked.fileno(), GET_ADDRESS, request)
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def _resolved(name: str) -> str:
    """The first address of a host's name that is this host's, as gloo finds it; or else the loopback's."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as attempt:
            try:
                attempt.bind(address)
            except OSError:
                continue
            return str(address[0])
    return "127.0.0.1"


def _network() -> str:
    try:
        return f"{BOOT.read_text().strip()} {os.readlink(NETWORK)}"
    except OSError:  # not Linux
        return socket.gethostname()
