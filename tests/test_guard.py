"""What the guard says of an epoch's time, each signal against an account of its own; and it changes nothing else."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL, Command, Kill
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import assert_same, contents

import morphtrain
from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.timing import contention as guard
from morphtrain.timing import foreign, reference
from morphtrain.timing.contention import Guard
from morphtrain.timing.cores import pinned
from morphtrain.timing.foreign import ForeignCpu, Reading, foreign_share
from morphtrain.timing.reference import NOMINAL_SECONDS, Calibration, Reference
from morphtrain.trainer import train

CPU = torch.device("cpu")
QUICK = (*SMALL, "tracking=none", "epochs=3", "hydra.run.dir=run")
CALIBRATED = {"reference_seconds", "calibrated_seconds", "calibrated_train_seconds"}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
# Started by a process that ends at once: nobody's child.
ORPHAN = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)
"""


def history(path: Path) -> list[dict[str, float]]:
    return read_records(path.parent)


@pytest.fixture
def busy_cpu() -> Iterator[int]:
    """A CPU on which somebody else's process never rests."""
    cpu = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", ORPHAN, SPIN, str(cpu)]
    pid = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    try:
        yield cpu
    finally:
        os.kill(pid, 9)


@linux
def test_a_busy_neighbour_is_seen(busy_cpu: int) -> None:
    account = ForeignCpu(frozenset({busy_cpu}))
    account.begin()
    time.sleep(0.7)
    assert account.share() > 0.8


def work(worked: Any, done: Any, leave: Any) -> None:
    while time.process_time() < 0.4:
        pass
    worked.value = time.process_time()  # in a large process, forking takes some of it, too
    done.set()
    leave.wait(30)


@linux
def test_the_work_of_live_and_ended_workers_counts_as_own() -> None:
    context = multiprocessing.get_context("fork")
    worked, done, leave = context.Value("d"), context.Event(), context.Event()
    worker = context.Process(target=work, args=(worked, done, leave))
    mine, ended, before = time.process_time(), ended_children(), foreign.own_seconds()
    worker.start()
    assert done.wait(30)
    assert worked.value >= 0.4
    assert foreign.own_seconds() - before == pytest.approx(worked.value + time.process_time() - mine, abs=0.05)
    leave.set()
    worker.join()
    worked_to_its_end = ended_children() - ended
    assert foreign.own_seconds() - before == pytest.approx(worked_to_its_end + time.process_time() - mine, abs=0.05)


@linux
def test_what_a_process_beside_and_its_children_do_counts_as_own() -> None:
    """Two processes of one run on one core are no strangers to each other, nor are the workers of either."""
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {spin!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    living = foreign.family_seconds(frozenset({process.pid}))
    assert 0.27 <= living < 2, "the kernel counts in hundredths, user and system apart"
    process.communicate("\n")
    assert foreign.family_seconds(frozenset({process.pid})) == foreign.family_seconds(frozenset()) == 0


def ended_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@linux
def test_all_cpus_together_are_what_the_kernel_sums_up() -> None:
    """The first line of /proc/stat is the sum of all CPUs'."""
    values = (foreign.PROC / "stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = map(int, values[:8])
    every = frozenset(range(os.cpu_count() or 1))
    expected = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    assert foreign.busy_seconds(every) == pytest.approx(expected, abs=0.2)
    assert foreign.busy_seconds(every) == pytest.approx(
        sum(foreign.busy_seconds(frozenset({c})) for c in every), abs=0.2
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    cpus=st.integers(1, 64),
    seconds=st.floats(0.1, 1e4),
    others=st.floats(0, 1, allow_subnormal=False),  # the trainer flushes them to zero, for good
    mine=st.floats(0, 1, allow_subnormal=False),
    before=st.floats(0, 1e6, allow_subnormal=False),
)
def test_the_share_is_of_what_was_not_ours(
    cpus: int, seconds: float, others: float, mine: float, before: float
) -> None:
    own = mine * (1 - others) * cpus * seconds
    start = Reading(before, 3 * before, before)
    end = Reading(before + seconds, 3 * before + others * cpus * seconds + own, before + own)
    assert foreign_share(start, end, cpus) == pytest.approx(others, abs=1e-5)


def test_short_epochs_are_judged_over_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of 0.3 s with pauses of 0.2 s; others use the CPU from the time 5 on, all of it."""
    now = [0.0]
    account = ForeignCpu(frozenset({0}))
    monkeypatch.setattr(account, "_read", lambda: Reading(now[0], max(0.0, now[0] - 5) + now[0] / 10, now[0] / 10))
    shares = {}
    while now[0] < 9:
        account.begin()
        now[0] += 0.3
        shares[round(now[0], 1)] = account.share()
        now[0] += 0.2
    assert max(share for at, share in shares.items() if at <= 5) < 1e-9
    assert min(share for at, share in shares.items() if at >= 6.3) > 1 - 1e-9
    assert 0.3 / 1.31 < shares[5.3] < 0.3 / 0.99  # of a second or a little more
    assert len(account.readings) < 8
    now[0] = 20.0
    account.begin()
    now[0] = 24.0
    assert account.share() == pytest.approx(1)
    assert account.readings[0].at == 20.0  # a long epoch is judged by itself


class Machine:
    """A reference whose device is as fast as `speed` says, on a clock of its own."""

    def __init__(self, step: float = 0.008) -> None:
        self.now, self.step, self.slowdown = 0.0, step, 1.0
        self.spent = 0.0

    def burst(self, seconds: float) -> float:
        took = max(seconds, self.step * self.slowdown)
        self.now += took
        self.spent += took
        return 1 / (self.step * self.slowdown)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(reference, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


@pytest.mark.parametrize("epoch", [0.02, 0.3, 2.0, 7.0, 200.0])
@pytest.mark.parametrize("slowdown", [1.0, 30.0])
def test_the_reference_keeps_to_its_share(epoch: float, slowdown: float, machine: Machine) -> None:
    machine.slowdown = slowdown
    calibration = Calibration(machine, share=0.02)  # type: ignore[arg-type]
    first = machine.spent
    epochs = max(20, int(60 / epoch))
    for _ in range(epochs):
        machine.now += epoch
        calibration.trained(epoch)
    spent, total = machine.spent - first, epochs * epoch
    assert spent <= 0.02 * total + 1e-9
    if epoch < 100 and slowdown == 1:  # longest bursts bound the cost of long epochs
        assert spent >= 0.01 * total, "and uses it"


@pytest.mark.parametrize("epoch", [0.3, 3.0])
def test_what_comes_and_goes_is_calibrated_away(epoch: float, machine: Machine) -> None:
    """Work of 120 s on a machine that others slow down threefold from the 30th to the 90th second of it."""
    calibration = Calibration(machine, share=0.02)  # type: ignore[arg-type]
    raw = calibrated = 0.0
    for number in range(round(120 / epoch)):
        machine.slowdown = 3.0 if 30 <= number * epoch < 90 else 1.0
        spent = epoch * machine.slowdown
        machine.now += spent
        calibration.trained(spent)
        raw += spent
        calibrated += calibration.calibrated(spent)
    assert raw == pytest.approx(240)
    assert calibrated == pytest.approx(120 * NOMINAL_SECONDS / machine.step, rel=0.03)


def test_rates_are_averaged_and_not_times(machine: Machine) -> None:
    """Half of the time at a third of the speed is two thirds of the work."""
    calibration = Calibration(machine, share=0.02)  # type: ignore[arg-type]
    machine.slowdown = 3.0
    calibration.trained(10.0)
    assert calibration.calibrated(10.0) == pytest.approx(10 * 2 / 3 * NOMINAL_SECONDS / machine.step)
    assert calibration.seconds == pytest.approx(1.5 * machine.step)
    calibration.trained(1.0)  # too short for a burst: what was before the last one is long ago
    assert calibration.seconds == pytest.approx(3 * machine.step)


@pytest.mark.parametrize("hiccup", [5.0, 30.0])
def test_a_first_measurement_that_was_disturbed_is_made_again(hiccup: float, machine: Machine) -> None:
    """Something stops the process for a moment just when the machine is measured before the first epoch."""
    quiet = Calibration(machine, share=0.02)  # type: ignore[arg-type]
    undisturbed, machine.slowdown = machine.burst, hiccup

    def burst(seconds: float) -> float:
        rate = undisturbed(seconds)
        machine.slowdown = 1.0
        return rate

    machine.burst = burst  # type: ignore[method-assign]
    disturbed = Calibration(machine, share=0.02)  # type: ignore[arg-type]
    assert disturbed.calibrated(10.0) == pytest.approx(quiet.calibrated(10.0), rel=0.01)


@pytest.mark.parametrize("slowdown", [1.0, 3.0])
def test_a_machine_that_is_always_as_slow_is_measured_as_such(slowdown: float, machine: Machine) -> None:
    machine.slowdown = slowdown
    calibration = Calibration(machine, share=0.02)  # type: ignore[arg-type]
    assert calibration.seconds == pytest.approx(slowdown * machine.step)
    assert machine.spent < 10 * 0.05, "two bursts agree at once"


def state_of_torch() -> dict[str, Any]:
    return {
        "random": torch.random.get_rng_state().tolist(),
        "denormal": (torch.tensor([1e-40]) * 1).item(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
        "default": [torch.get_default_dtype(), torch.get_default_device()],
    }


@pytest.mark.parametrize("flush", [True, False])
def test_the_workload_leaves_the_process_as_it_was(flush: bool) -> None:
    torch.set_flush_denormal(flush)
    try:
        with torch.no_grad():
            before = state_of_torch()
            workload = Reference(CPU)
            weights = [parameter.clone() for parameter in workload.model.parameters()]
            assert 1 < workload.burst(0.02) < 1e5
            assert state_of_torch() == before
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(a, b) for a, b in zip(weights, workload.model.parameters(), strict=True)), "the same work"
    again = Reference(CPU)
    assert torch.equal(workload.images, again.images)
    assert workload.model[0].weight.std() > 0


@linux
@pytest.mark.slow  # wants a quiet machine
def test_the_workload_slows_down_beside_others(busy_cpu: int) -> None:
    """On the CPU of a process that never rests it gets half of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    workload = Reference(CPU)
    try:
        free = max(workload.burst(0.1) for _ in range(5))
        with pinned(frozenset({busy_cpu})):
            beside = workload.burst(0.5)
    finally:
        torch.set_num_threads(threads)
    assert beside < 0.8 * free


def test_neither_reference_nor_guard_change_the_bits(tmp_path: Path, command: Command) -> None:
    """With dropout, which draws random numbers in every step."""
    kept = (o for o in QUICK if not o.startswith(("model", "hydra", "data.image_size", "prune")))
    here = [*kept, "model=alexnet", "data.image_size=16", "model.dropout=0.5"]
    assert command(*here, "hydra.run.dir=without", "timing.reference=0").returncode == 0
    assert command(*here, "hydra.run.dir=with", "timing.reference=1").returncode == 0
    records = {name: history(tmp_path / name / "last.pt") for name in ("without", "with")}
    assert not CALIBRATED & set(records["without"][0])
    assert all(set(record) >= CALIBRATED for record in records["with"])
    assert len({record["reference_seconds"] for record in records["with"]}) > 1, "there were bursts between the epochs"
    stored = {name: contents(tmp_path / name / "last.pt") for name in ("without", "with")}
    for content in stored.values():
        content["facts"]["config"].pop("timing")
    assert_same(stored["without"], stored["with"])


def test_calibrated_times_add_up_over_a_kill(tmp_path: Path, command: Command, kill: Kill) -> None:
    kill("rename:4", *QUICK, "timing.reference=0.2")
    first = history(tmp_path / "run" / "last.pt")
    result = command(*QUICK, "resume=auto", "timing.reference=0.2")
    assert result.returncode == 0, result.stderr
    records = history(tmp_path / "run" / "last.pt")
    assert records[: len(first)] == first
    assert 0 < len(first) < len(records) == 3
    raw = calibrated = 0.0
    for record in records:
        rate = NOMINAL_SECONDS / record["reference_seconds"]
        seconds = record["setup_seconds"] + record["epoch_seconds"] + record["morph_seconds"]
        raw, calibrated = raw + seconds, calibrated + seconds * rate
        assert record["train_seconds"] == pytest.approx(raw), "nothing is subtracted"
        assert record["calibrated_seconds"] == pytest.approx(record["epoch_seconds"] * rate)
        assert record["calibrated_train_seconds"] == pytest.approx(calibrated)
        assert record["contended"] in (0.0, 1.0)
        assert sys.platform != "linux" or 0 <= record["foreign_cpu"] <= 1


def test_they_are_returned_to_a_sweeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    metrics = ["contended", *sorted(CALIBRATED)]
    config = morphtrain.compose(*QUICK[:-1], f"objective=[{','.join(metrics)}]")
    returned = train(config, tmp_path, dict.fromkeys(schema.OPTIONS, ""))
    assert returned == [history(tmp_path / "last.pt")[-1][metric] for metric in metrics]


@pytest.mark.parametrize("metric", sorted(CALIBRATED))
def test_no_reference_no_calibrated_objective(metric: str) -> None:
    morphtrain.compose(f"objective=[{metric}]")
    with pytest.raises(UserError, match=rf"timing.reference=0.0: must be above 0 for objective={metric}"):
        morphtrain.compose(f"objective=[{metric}]", "timing.reference=0")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("timing.cores=0", "timing.cores=0: must be 1 or more, or null"),
        ("timing.when_busy=maybe", "timing.when_busy=maybe: must be one of mark, wait, refuse"),
        ("timing.reference=2", r"timing.reference=2.0: .* 0 to 1"),
    ],
)
def test_wrong_keys_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        morphtrain.compose(override)


def judge(reference_share: float, before: list[dict[str, float]], **slot: Any) -> Guard:
    place = SimpleNamespace(device=CPU, cpus=frozenset(), claim=SimpleNamespace(others=lambda: []))
    vars(place).update(slot)
    return Guard(place, schema.timing.Timing("default", "edges", 1, None, "mark", reference_share, None), before)  # type: ignore[arg-type]


EPOCH = {"epoch": 1.0, "setup_seconds": 0.0, "epoch_seconds": 1.0, "morph_seconds": 0.0}


def test_every_signal_marks_and_the_first_one_warns(caplog: pytest.LogCaptureFixture) -> None:
    others: list[int] = []
    shares = iter([0.05, 0.5, 0.05, 0.05])
    watched = judge(0.0, [], claim=SimpleNamespace(others=lambda: list(others)))
    watched.foreign = SimpleNamespace(begin=lambda: None, share=lambda: next(shares))  # type: ignore[assignment]
    records: list[dict[str, float]] = []
    for number, present in enumerate(([], [], [17], []), 1):
        others[:] = present
        watched.epoch_begins()
        others.clear()  # whoever was there at the start of an epoch has disturbed it
        records.append(watched.judged(EPOCH | {"epoch": number}, records))
    assert [record["contended"] for record in records] == [0, 1, 1, 0]
    (message,) = caplog.messages
    assert "epoch 2 was contended: others used 50% of its cores" in message


def test_of_several_processes_the_most_disturbed_is_named_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    others = lambda mine: [mine, (0.67, [reason.replace("50%", "67%") for reason in mine[1]])]  # noqa: E731
    monkeypatch.setattr(guard.world, "gathered", others)
    watched = judge(0.0, [], claim=SimpleNamespace(others=list))
    watched.foreign = SimpleNamespace(begin=lambda: None, share=lambda: 0.5)  # type: ignore[assignment]
    watched.epoch_begins()
    assert watched.judged(EPOCH, [])["foreign_cpu"] == 0.67
    (message,) = caplog.messages
    assert "contended: others used 67% of its cores. " in message


def test_without_an_account_the_reference_tells(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "Reference", lambda device: machine)
    watched = judge(0.5, [], device=torch.device("xpu", 0))
    records: list[dict[str, float]] = []
    for number, slowdown in enumerate((1.0, 1.1, 4.0, 4.0, 1.0, 1.0), 1):
        machine.slowdown = slowdown
        watched.epoch_begins()
        records.append(watched.judged(EPOCH | {"epoch": number}, records))
    assert [record["contended"] for record in records] == [0, 0, 1, 1, 1, 0]  # the fifth: just after the others
    assert "foreign_cpu" not in records[0]


def test_a_sum_with_unknown_parts_is_refused() -> None:
    bare, known = EPOCH | {"epoch": 2.0}, EPOCH | dict.fromkeys(CALIBRATED, 1.0)
    with pytest.raises(UserError, match=r"timing.reference=0.02: epoch 2 was trained without"):
        judge(0.02, [known, bare])
    judge(0.0, [known, bare])
    judge(0.02, [known])


@linux
def test_a_run_beside_a_busy_process_is_marked(busy_cpu: int, command: Command, tmp_path: Path) -> None:
    """The one core it takes is the first, which somebody else uses."""
    result = command(*QUICK, "epochs=1", "timing.cores=1", env={"TMPDIR": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert "epoch 1 was contended: others used" in result.stdout
    assert "1 of 1" in result.stdout  # the closing table
    assert [record["contended"] for record in history(tmp_path / "run" / "last.pt")] == [1]


@pytest.mark.slow
@linux
def test_beside_three_others_raw_times_differ_and_calibrated_ones_agree(tmp_path: Path) -> None:
    """Four real runs, each on one of two cores. The benchmark also lets all have all cores."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "contention.py"
    found = importlib.util.spec_from_file_location("contention", path)
    assert found is not None
    assert found.loader is not None
    contention = importlib.util.module_from_spec(found)
    sys.modules["contention"] = contention  # its dataclasses look themselves up
    found.loader.exec_module(contention)
    with pytest.MonkeyPatch.context() as patch, pinned(frozenset(sorted(os.sched_getaffinity(0))[:2])):
        patch.setenv("TMPDIR", str(tmp_path))
        pairs = contention.compare(tmp_path, 3, "timing.cores=1", "model.width=16")
    assert all(busy.contended == 1 for _, busy in pairs)
    assert statistics.median(busy.raw / quiet.raw for quiet, busy in pairs) > 1.4
    agreement = statistics.median(busy.calibrated / quiet.calibrated for quiet, busy in pairs)
    assert agreement == pytest.approx(1, abs=contention.LIMIT)
