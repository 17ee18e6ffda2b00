"""Does a narrower network gain more where the link between two hosts is slow? Two ranks of the command, on two "hosts".

    sudo python two_hosts.py [rounds [results.jsonl]]     # 3; needs root and iproute2

The hosts are network namespaces of this machine, with a cable of 100 Mbit or 1 Gbit a second between them. A round
trains the dense network, one of half its width and one of a quarter, in an order by chance; in every run the epochs
after the first are on the slow and on the fast link in turns. Bytes are counted at the interface. With a file, results
are added to those that it holds, and the answer is of all of them: so rounds can be measured a few at a time.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from namespaces import INTERFACE, Host, limit, missing, two_hosts

from morphtrain.evidence.records import read_records
from morphtrain.evidence.repeats import Estimate, geometric

PORT = 29_500
POLL_SECONDS = 0.002
LIMIT_SECONDS = 300.0
WIDTHS = {"dense": 32, "half width": 16, "quarter width": 8}
SLOW, FAST = "100mbit", "1gbit"
BATCH, TRAIN_SAMPLES = 128, 1437  # of data=digits
STEPS = math.ceil(TRAIN_SAMPLES / BATCH)
RUN = ("model.blocks=2", f"batch_policy.batch_size={BATCH}", "timing.cores=1", "timing.reference=0", "tracking=none")
TOLERANCE = 0.02  # of bytes against parameters


@dataclass(frozen=True)
class Epoch:
    """One epoch of an arm of a round, on a link.

    Args:
        bytes: what one host has sent meanwhile, the mean of both.
        comm_seconds: what the run itself says it has waited for the other.
    """

    round: int
    arm: str
    link: str
    params: int
    seconds: float
    bytes: float
    comm_seconds: float


def ranks(
    hosts: Sequence[Host], directory: Path, *overrides: str, interface: str | None = INTERFACE
) -> list[subprocess.Popen[str]]:
    """Start the command as rank 0 on the first host, as rank 1 on the second, and so on.

    Args:
        interface: of gloo; None: the one that it takes by itself.
    """
    processes = []
    for rank, host in enumerate(hosts):
        place = {"RANK": rank, "WORLD_SIZE": len(hosts), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        environment |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(PORT), "OMP_NUM_THREADS": "1"}
        environment.pop("GLOO_SOCKET_IFNAME", None)
        if interface is not None:
            environment["GLOO_SOCKET_IFNAME"] = interface
        command = host.command(sys.executable, "-m", "morphtrain.run", *overrides, f"hydra.run.dir={directory}")
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    return processes


def outcome(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and error output of each, once all have ended."""
    try:
        texts = [process.communicate(timeout=LIMIT_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def sent_by_epoch(
    hosts: Sequence[Host], directory: Path, *overrides: str, next_epoch: Callable[[int], None] = lambda number: None
) -> list[float]:
    """Train on `hosts`; the mean number of bytes that each has sent in every epoch, with what follows on it.

    Args:
        next_epoch: called with the number of every epoch, from 1, as it begins.
    """
    processes = ranks(hosts, directory, *overrides)
    next_epoch(1)
    counts = []
    for number in _finished(directory / "records.jsonl", processes):
        counts.append(statistics.fmean(host.sent() for host in hosts))
        next_epoch(number + 1)
    for code, _, errors in outcome(processes):
        assert code == 0, errors
    return [after - before for before, after in zip([0.0, *counts], counts, strict=False)]


def _finished(records: Path, processes: Sequence[subprocess.Popen[str]]) -> Iterator[int]:
    """The number of every epoch as soon as its record is there."""
    number, end = 0, time.monotonic() + LIMIT_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        lines = records.read_text().count("\n") if records.exists() else 0
        while number < lines:
            number += 1
            yield number
        time.sleep(POLL_SECONDS)


def measure(hosts: Sequence[Host], number: int, arm: str) -> list[Epoch]:
    """One run: an epoch that warms up, then two on each link, by chance slow fast fast slow or the other way round."""
    links = random.choice([(SLOW, FAST, FAST, SLOW), (FAST, SLOW, SLOW, FAST)])
    plan = (links[0], *links)

    def next_epoch(epoch: int) -> None:
        for host in hosts if epoch <= len(plan) else ():
            limit(host, plan[epoch - 1])

    with tempfile.TemporaryDirectory() as directory:
        words = (*RUN, f"model.width={WIDTHS[arm]}", f"epochs={len(plan)}")
        sent = sent_by_epoch(hosts, Path(directory), *words, next_epoch=next_epoch)
        records = read_records(Path(directory))
    measured = list(zip(plan, records, sent, strict=True))[1:]
    return [
        Epoch(number, arm, link, int(record["params"]), record["epoch_seconds"], count, record["comm_seconds"])
        for link, record, count in measured
    ]


def report(epochs: Sequence[Epoch]) -> None:
    """Print bytes against parameters, and the times of narrower networks against the dense one on each link."""
    params = {epoch.arm: epoch.params for epoch in epochs}
    sent = {arm: statistics.median(epoch.bytes / STEPS for epoch in epochs if epoch.arm == arm) for arm in WIDTHS}
    for arm in WIDTHS:
        off = sent[arm] / sent["dense"] / (params[arm] / params["dense"]) - 1
        held = "ok" if abs(off) <= TOLERANCE else "EXCEEDED"
        print(
            f"two hosts: {arm}: {params[arm]} parameters, {sent[arm] / 1e6:.4f} MB a step and host "
            f"({sent[arm] / params[arm]:.3f} bytes a parameter), of dense off by {off:+.2%}   limit 2% {held}"
        )
    for link in (SLOW, FAST):
        for arm in WIDTHS:
            own = [epoch for epoch in epochs if (epoch.arm, epoch.link) == (arm, link)]
            seconds = statistics.median(epoch.seconds for epoch in own)
            waiting = statistics.median(epoch.comm_seconds / epoch.seconds for epoch in own)
            print(f"two hosts: {link}: {arm}: {seconds:.3f} s an epoch, {waiting:.0%} of it waiting for the other")
    for arm in list(WIDTHS)[1:]:
        for link in (SLOW, FAST):
            print(f"two hosts: {link}: {arm} / dense = {_of_rounds(epochs, arm, link)}")
        slow, fast = (_of_rounds(epochs, arm, link).values for link in (SLOW, FAST))
        more = geometric([a / b for a, b in zip(slow, fast, strict=True)])
        print(f"two hosts: {arm} / dense, on {SLOW} / on {FAST} = {more}")


def _of_rounds(epochs: Sequence[Epoch], arm: str, link: str) -> Estimate:
    """The ratio of an arm's time to the dense network's on a link: one of each round, and their geometric mean."""

    def mean(number: int, which: str) -> float:
        return statistics.geometric_mean(
            epoch.seconds for epoch in epochs if (epoch.round, epoch.arm, epoch.link) == (number, which, link)
        )

    return geometric([mean(number, arm) / mean(number, "dense") for number in sorted({e.round for e in epochs})])


def main() -> None:
    if reason := missing():
        sys.exit(reason)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    kept = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    epochs = [Epoch(**json.loads(line)) for line in kept.read_text().splitlines()] if kept and kept.exists() else []
    first = 1 + max((epoch.round for epoch in epochs), default=0)
    with two_hosts() as hosts:
        for number in range(first, first + rounds):
            found = [epoch for arm in random.sample(list(WIDTHS), len(WIDTHS)) for epoch in measure(hosts, number, arm)]
            epochs += found
            if kept:
                with kept.open("a") as file:
                    file.writelines(f"{json.dumps(asdict(epoch))}\n" for epoch in found)
    report(epochs)


if __name__ == "__main__":
    main()
