"""Two hosts, network namespaces with a cable between them: bytes fall as parameters, and a wrong interface is named."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from morphtrain.evidence.records import read_records

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # its dataclasses look themselves up, and each other
    found.loader.exec_module(module)
    return module


namespaces = benchmark("namespaces")
two_hosts = benchmark("two_hosts")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(namespaces.missing()), reason=str(namespaces.missing())),
]

# Each epoch is cut, from a size at which what is sent beside gradients does not count.
PRUNED = """
    data=synthetic data.train_samples=512 data.val_samples=64 data.image_size=8 batch_policy.batch_size=32 epochs=8
    model.width=24 model.blocks=2 prune=prunetrain prune.lasso_ratio=0.95 prune.lasso_ratio_of=loss prune.interval=1
    prune.start_epoch=2 timing.cores=1 timing.reference=0 tracking=none
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple]:
    with namespaces.two_hosts() as made:
        yield made


def test_bytes_fall_as_parameters_when_a_network_is_pruned(hosts: tuple, tmp_path: Path) -> None:
    sent = two_hosts.sent_by_epoch(hosts, tmp_path, *PRUNED.split())
    records = read_records(tmp_path)
    assert len(sent) == len(records) == 8
    params = [record["params"] for record in records]  # with which the next epoch is trained
    assert params[-1] < 0.7 * params[0]
    steps = 512 // 32
    per_parameter = [count / steps / number for count, number in zip(sent[1:], params, strict=False)]
    for one, other in itertools.pairwise(per_parameter):
        assert one == pytest.approx(other, rel=two_hosts.TOLERANCE)
    assert per_parameter[0] == pytest.approx(4, rel=0.1), "each host sends every gradient once, in four bytes"
    if "comm_bytes" in records[0]:
        for count, record in zip(sent[1:], records[1:], strict=True):
            assert record["comm_bytes"] == pytest.approx(count, rel=0.1)


@pytest.mark.parametrize(
    ("interface", "said"), [("lo", "=lo is 127.0.0.1"), ("eth7", "=eth7: there is no"), (None, "")]
)
def test_a_wrong_interface_is_named_in_one_line_in_time(
    interface: str | None, said: str, hosts: tuple, tmp_path: Path
) -> None:
    """No host name is known in a namespace but as 127.0.0.1, so that an interface has to be named."""
    start = time.monotonic()
    processes = two_hosts.ranks(hosts, tmp_path / "run", "tracking=none", "model.width=8", interface=interface)
    (code, _, message), (other_code, _, silence) = two_hosts.outcome(processes)
    assert time.monotonic() - start < 30
    assert code != 0 != other_code
    assert message.startswith(f"GLOO_SOCKET_IFNAME{said}")
    for host in hosts:
        assert f"{namespaces.INTERFACE} ({host.address})" in message
    assert "NCCL_SOCKET_IFNAME" in message
    assert message.count("\n") == 1
    assert not silence
    assert not (tmp_path / "run").exists()


def test_a_link_is_as_fast_as_it_is_said_to_be(hosts: tuple) -> None:
    """A transfer of 2 MB over 20 Mbit a second takes 0.8 s, less what may go at once."""
    size, rate = 2_000_000, 20e6
    receive = (
        "import socket, sys; s = socket.create_server((sys.argv[1], 4711)); print(flush=True); c, _ = s.accept()\n"
        "while c.recv(65536): pass"
    )
    send = (
        "import socket, sys, time; c = socket.create_connection((sys.argv[1], 4711)); start = time.monotonic()\n"
        f"c.sendall(bytes({size})); c.shutdown(socket.SHUT_WR); c.recv(1); print(time.monotonic() - start)"
    )
    first, second = hosts
    namespaces.limit(second, "20mbit")
    try:
        command = first.command(sys.executable, "-c", receive, first.address)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as receiver:
            assert receiver.stdout is not None
            receiver.stdout.readline()
            before = second.sent()
            found = subprocess.run(
                second.command(sys.executable, "-c", send, first.address), capture_output=True, text=True, check=True
            )
    finally:
        namespaces.limit(second, "10gbit")
    assert 0.7 * 8 * size / rate < float(found.stdout) < 1.5 * 8 * size / rate
    assert second.sent() - before == pytest.approx(size, rel=0.1)


def test_a_killed_script_leaves_nothing() -> None:
    script = (
        f"import sys, time; sys.path.insert(0, {str(BENCHMARKS)!r}); from namespaces import two_hosts\n"
        "with two_hosts() as hosts: print(*(host.pid for host in hosts), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        holders = [int(pid) for pid in process.stdout.readline().split()]
        assert len(holders) == 2
        assert all(map(lives, holders))
        os.kill(process.pid, signal.SIGKILL)
    end = time.monotonic() + 5
    while any(map(lives, holders)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(lives, holders))
    devices = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert not re.search(rf"^\d+: {namespaces.INTERFACE}\b", devices, re.MULTILINE)


def lives(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
