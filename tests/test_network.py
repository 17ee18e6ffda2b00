"""Processes that cannot reach each other say so in one line that names GLOO_SOCKET_IFNAME and what there is."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from torch.distributed import HashStore

from morphtrain.errors import UserError
from morphtrain.processes import network
from morphtrain.processes.network import End

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="interfaces are looked up as on Linux")

FIRST = End("first", "alpha", "127.0.0.1", {"eth0": "10.0.0.1"}, "")
SECOND = End("second", "beta", "127.0.0.1", {"eth0": "10.0.0.2", "ib0": "10.1.0.2"}, "")
ADVICE = (
    "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME for GPUs) on every host to its interface that the others reach; "
    "there is eth0 (10.0.0.1) on alpha and eth0 (10.0.0.2), ib0 (10.1.0.2) on beta"
)


def answers(*ends: End) -> list[str]:
    """What the check of each process, which all run at once, says: its error, or "reached"."""
    store, found = HashStore(), [""] * len(ends)

    def check(rank: int) -> None:
        try:
            network.check(ends[rank], rank, len(ends), store)
            found[rank] = "reached"
        except UserError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=check, args=(rank,)) for rank in range(len(ends))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> Sequence[End]:
    """Ends that are taken for such of two hosts, though both are on this one."""
    monkeypatch.setattr(End, "is_loopback", property(lambda self: False))
    return FIRST, SECOND


def test_processes_that_reach_each_other_go_on(reachable: Sequence[End]) -> None:
    assert answers(*reachable) == ["reached", "reached"]
    assert answers(FIRST, SECOND, replace(FIRST, host="gamma", network="third")) == ["reached"] * 3


def test_on_one_host_the_loopback_will_do() -> None:
    assert answers(FIRST, FIRST) == ["reached", "reached"]


def test_a_host_whose_name_is_its_loopback_is_named_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_listening", lambda address: socket.create_server(("127.0.0.1", 0)))
    outside = replace(FIRST, address="10.0.0.1")
    named = "GLOO_SOCKET_IFNAME is not set, and the name of rank 1's host, beta, stands for 127.0.0.1, "
    named += "which no other host reaches; "
    assert answers(outside, SECOND) == [named + ADVICE] * 2


def test_the_loopback_as_interface_is_named() -> None:
    chosen = [replace(end, wanted="lo") for end in (FIRST, SECOND)]
    named = "GLOO_SOCKET_IFNAME=lo is 127.0.0.1, which no other host reaches; "
    assert answers(*chosen) == [named + ADVICE] * 2


def test_an_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_listening", lambda address: socket.create_server(("127.0.0.1", 0)))
    chosen = replace(SECOND, address="", wanted="eth7")
    named = "GLOO_SOCKET_IFNAME=eth7: there is no such interface with an address on rank 1's host, beta; "
    assert answers(replace(FIRST, address="10.0.0.1"), chosen) == [named + ADVICE] * 2


def test_an_address_that_does_not_answer_ends_it_in_time(
    reachable: Sequence[End], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(address: tuple[str, int], timeout: float) -> socket.socket:
        time.sleep(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(network, "SECONDS", 0.3)
    monkeypatch.setattr(socket, "create_connection", silent)
    start = time.monotonic()
    found = answers(*(replace(end, wanted="eth0") for end in reachable))
    assert time.monotonic() - start < 5
    named = (
        "GLOO_SOCKET_IFNAME=eth0: rank 0 on alpha cannot reach rank 1 at 127.0.0.1 (beta) within 0.3 s (timed out); "
    )
    assert found == [named + ADVICE] * 2


def test_a_group_that_cannot_be_formed_is_one_line() -> None:
    with pytest.raises(UserError) as caught, network.checked(0, 1, HashStore()):
        raise RuntimeError("Gloo connectFullMesh failed with [10.0.0.2]:4711\nand more")
    message = str(caught.value)
    assert message.startswith("GLOO_SOCKET_IFNAME: the processes could not form a group (Gloo connectFullMesh failed")
    assert "\n" not in message


def test_this_host_is_seen_as_gloo_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    by_name = network.here()
    assert (by_name.address, by_name.wanted, by_name.is_loopback) == ("127.0.0.1", "lo", True)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing0")
    assert network.here().address == ""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    found = network.here()
    assert "lo" not in found.interfaces
    assert set(found.interfaces) <= {name for _, name in socket.if_nameindex()}
    assert found.network == by_name.network
    assert os.readlink("/proc/self/ns/net") in found.network
    with socket.create_server((found.address, 0), family=network._family(found.address)):
        pass  # it is this host's
