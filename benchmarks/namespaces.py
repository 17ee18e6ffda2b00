"""Two hosts on one machine: network namespaces with a cable between them, whose speed can be set.

Nothing of them has a name that could be left behind: a namespace lives as long as the process that holds it open, and
that ends with this one, however it ends. The kernel takes the cable away with them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ip", "tc", "nsenter", "setpriv", "unshare")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "cable"
ENDS_WITH_US = ("setpriv", "--pdeathsig=KILL")
BURST, LATENCY = "128kb", "200ms"  # of tbf: sent at once after a pause, and the longest wait in its queue


@dataclass(frozen=True)
class Host:
    """A namespace: the process that holds it open, and its address on the cable."""

    pid: int
    address: str

    def command(self, *words: str) -> list[str]:
        """A command that runs there, and ends with this process."""
        return [*ENDS_WITH_US, "nsenter", f"--net=/proc/{self.pid}/ns/net", *words]

    def run(self, *words: str) -> None:
        """Run a command there, to its end."""
        _run(*self.command(*words))

    def sent(self) -> int:
        """Bytes that have gone out through its end of the cable, headers included."""
        text = Path(f"/proc/{self.pid}/net/dev").read_text()
        found = re.search(rf"^ *{INTERFACE}:(.*)$", text, re.MULTILINE)
        assert found is not None
        return int(found[1].split()[8])


def missing() -> str | None:
    """Why no namespaces can be made here; None if they can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)}: not installed (Debian: apt-get install iproute2 util-linux)"
    return None if os.getuid() == 0 else "network namespaces are made as root"


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other, and nothing else, through `INTERFACE`; as fast as the machine is, at first."""
    with ExitStack() as stack:
        first, second = (Host(stack.enter_context(_namespace()), address) for address in ADDRESSES)
        end = ("netns", str(first.pid)), ("netns", str(second.pid))
        _run("ip", "link", "add", INTERFACE, *end[0], "type", "veth", "peer", "name", INTERFACE, *end[1])
        for host in (first, second):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                host.run("ip", "link", "set", device, "up")
        yield first, second


def limit(host: Host, rate: str) -> None:
    """Let a host send no more than `rate`, such as "100mbit", from now on."""
    limits = ("rate", rate, "burst", BURST, "latency", LATENCY)
    host.run("tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *limits)


@contextmanager
def _namespace() -> Iterator[int]:
    """The process that holds a new network namespace open."""
    holder = subprocess.Popen([*ENDS_WITH_US, "unshare", "--net", "sleep", "infinity"])
    try:
        own, its = "/proc/self/ns/net", f"/proc/{holder.pid}/ns/net"
        while os.readlink(its) == os.readlink(own):
            assert holder.poll() is None, "no network namespace can be made"
            time.sleep(0.005)
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def _run(*words: str) -> None:
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
