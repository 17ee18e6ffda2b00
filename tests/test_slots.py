"""Runs on one host: none has what another has, whatever started them, and nothing stays taken."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import in_ranks

from morphtrain import schema, world
from morphtrain.errors import UserError
from morphtrain.timing import claims as claims_module
from morphtrain.timing import cores, slot
from morphtrain.timing.claims import Claims, Use, shared_claims
from morphtrain.timing.slot import take_slot

CPU = [torch.device("cpu")]
ALLOWED = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
linux_with_two_cores = pytest.mark.skipif(len(ALLOWED) < 2, reason="needs affinities and two CPUs")
QUICK = (*SMALL, "tracking=none", "epochs=2", "prune.start_epoch=9")

HOLDER = """
import sys, time
from pathlib import Path
from morphtrain.timing.claims import Claims
claim = Claims(Path(sys.argv[1])).claim(lambda uses: tuple(sys.argv[2:]))
print("claimed", flush=True)
sys.stdin.read()
"""


def timing(**keys: object) -> schema.timing.Timing:
    return schema.timing.Timing(
        **{
            **dict(name="default", sync="edges", warmup_epochs=1, cores=None),
            **dict(when_busy="mark", reference=0.0, target_accuracy=None),
            **keys,
        }
    )  # type: ignore[arg-type]


def holder(directory: Path, *resources: str) -> subprocess.Popen[str]:
    """A process that has claimed `resources`, until it is killed or its stdin is closed."""
    command = [sys.executable, "-c", HOLDER, str(directory), *resources]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    return process


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> dict[str, frozenset[int]]:
    """This process may use four cores, the first of two CPUs, and stays where it is."""
    found = {f"core {i}": frozenset({i} if i else {0, 4}) for i in range(4)}
    monkeypatch.setattr(slot, "allowed_cores", lambda: found)
    monkeypatch.setattr(slot, "pinned", lambda cpus: contextlib.nullcontext())
    return found


def test_a_killed_process_frees_what_it_had(tmp_path: Path) -> None:
    process = holder(tmp_path, "core 0", "core 1")
    claims = Claims(tmp_path)
    assert claims.uses() == [Use(process.pid, ("core 0", "core 1"))]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert claims.uses() == []
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


def test_both_sides_see_an_overlap(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    claim = claims.claim(lambda uses: ("core 1", "core 2"))
    assert claim.others() == []
    process = holder(tmp_path, "core 2", "core 3")
    beside = claims.claim(lambda uses: ("core 0",))
    assert claim.others() == [process.pid]
    assert beside.others() == []
    process.communicate()
    assert claim.others() == []
    claim.release()
    beside.release()
    assert claims.uses() == []


def test_a_forked_child_does_not_keep_what_its_parent_gave_back(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    claim = claims.claim(lambda uses: ("core 0",))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)
        os._exit(0)
    copy = claim.path.read_text()
    claim.release()
    claim.path.write_text(copy)  # the same file, as if it had not been removed; its lock decides
    assert claims.uses() == []
    os.write(writing, b"x")
    os.waitpid(child, 0)


def test_what_is_refused_claims_nothing(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    with pytest.raises(ZeroDivisionError):
        claims.claim(lambda uses: (str(1 / 0),))
    assert claims.uses() == []
    claims.claim(lambda uses: ("core 0",)).release()  # the lock is not held any more


def test_claims_are_made_one_after_the_other(tmp_path: Path) -> None:
    """Twenty threads, each with a claim of its own: every one sees the claims of all before it, and of no more."""
    seen: list[int] = []

    def take() -> None:
        Claims(tmp_path).claim(lambda uses: (seen.append(len(uses)), time.sleep(0.002), ("core 0",))[-1])

    threads = [threading.Thread(target=take) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == list(range(20))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=12))
def test_runs_of_different_sizes_never_share_while_there_is_room(steps: list[tuple[int, bool]]) -> None:
    """Runs of 1 to 4 of 4 cores come and go: who fits gets cores nobody has, who does not is refused."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(slot, "allowed_cores", lambda: {f"core {i}": frozenset({i}) for i in range(4)})
        patch.setattr(slot, "pinned", lambda cpus: contextlib.nullcontext())
        patch.setattr(torch, "set_num_threads", lambda threads: None)  # each restores it, but they end in any order
        running: list = []
        for count, leaves in steps:
            if leaves and running:
                running.pop(0)[0].__exit__(None, None, None)
            free = 4 - sum(len(taken.cpus) for _, taken in running)
            place = take_slot(CPU, timing(cores=count, when_busy="refuse"), Claims(Path(directory)))
            if count > free:
                with pytest.raises(UserError, match=r"timing.when_busy=refuse"):
                    place.__enter__()
                continue
            taken = place.__enter__()
            assert len(taken.cpus) == count
            assert not any(taken.cpus & other.cpus for _, other in running)
            running.append((place, taken))
        for place, _ in running:
            place.__exit__(None, None, None)
        assert Claims(Path(directory)).uses() == []


def test_a_run_takes_whole_cores_and_the_least_used(tmp_path: Path, four_cores: dict) -> None:
    claims = Claims(tmp_path)
    with take_slot(CPU, timing(cores=1), claims) as first, take_slot(CPU, timing(cores=2), claims) as second:
        assert first.cpus == {0, 4}
        assert second.cpus == {1, 2}
        assert first.claim.others() == second.claim.others() == []
        with take_slot(CPU, timing(), claims) as all_of_them:
            assert all_of_them.cpus == {0, 1, 2, 3, 4}
            assert first.claim.others() == [os.getpid()]
            assert all_of_them.claim.others() == [os.getpid()] * 2
            with take_slot(CPU, timing(cores=2), claims) as fourth:
                assert fourth.cpus == {3, 0, 4}  # core 3 had one user, the others two
        assert first.claim.others() == []


def test_devices_are_taken_like_cores(tmp_path: Path, four_cores: dict) -> None:
    """Any device type goes by its name; a run on one takes no cores unless it is told to."""
    claims, devices = Claims(tmp_path), [torch.device("xpu", 0), torch.device("xpu", 1)]
    with take_slot(devices, timing(), claims) as first, take_slot(devices, timing(cores=1), claims) as second:
        assert (first.device, second.device) == tuple(devices)
        assert (first.cpus, second.cpus) == (frozenset(), {0, 4})
        with take_slot(devices[1:], timing(), claims) as third:
            assert third.device == devices[1]
            assert second.claim.others() == [os.getpid()]
            assert first.claim.others() == []
        with (
            pytest.raises(UserError, match=r"timing.when_busy=refuse: xpu:0: in use by process"),
            take_slot(devices, timing(when_busy="refuse"), claims),
        ):
            pass


def test_more_cores_than_there_are_is_a_mistake(tmp_path: Path, four_cores: dict) -> None:
    with pytest.raises(UserError, match=r"timing.cores=5: .* 4"), take_slot(CPU, timing(cores=5), Claims(tmp_path)):
        pass


def test_waiting_ends_when_the_place_is_free(tmp_path: Path, four_cores: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "POLL_SECONDS", 0.01)
    process = holder(tmp_path, "core 0", "core 1", "core 2")
    taken = threading.Event()

    def run() -> None:
        with take_slot(CPU, timing(cores=2, when_busy="wait"), Claims(tmp_path)) as place:
            assert not place.claim.others()
            taken.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert not taken.wait(0.2)
    process.kill()
    assert taken.wait(10)
    thread.join()
    process.wait()


def test_cpus_of_a_core_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, siblings in {0: "0,4", 1: "1,5", 2: "2-3", 3: "2-3", 4: "0,4"}.items():
        path = tmp_path / f"cpu{cpu}" / "topology"
        path.mkdir(parents=True)
        (path / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(cores, "CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 0, 2, 3, 5, 7}, raising=False)
    # 1 is not allowed; of 5 and 7 nothing is known
    expected = {"core 0": {0, 4}, "core 2": {2, 3}, "core 5": {5}, "core 7": {7}}
    assert cores.allowed_cores() == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4}, raising=False)
    assert cores.allowed_cores() == {"core 0": {4}}  # the same core, by another of its CPUs


@linux_with_two_cores
def test_all_threads_are_moved_and_go_back() -> None:
    """torch's workers exist before the run does; each thread gets back its own affinity."""
    go, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (go.set(), done.wait(30)))
    thread.start()
    go.wait(10)
    os.sched_setaffinity(thread.native_id, {ALLOWED[1]})
    before = {t: os.sched_getaffinity(t) for t in cores._threads()}
    late: list[int] = []
    with cores.pinned(frozenset({ALLOWED[0]})):
        assert {tuple(os.sched_getaffinity(t)) for t in cores._threads()} == {(ALLOWED[0],)}
        inside = threading.Thread(target=lambda: (late.append(threading.get_native_id()), done.wait(30)))
        inside.start()
        until(lambda: len(late) == 1)
        assert os.sched_getaffinity(late[0]) == {ALLOWED[0]}
    assert {t: os.sched_getaffinity(t) for t in before} == before
    assert os.sched_getaffinity(thread.native_id) == {ALLOWED[1]}
    assert os.sched_getaffinity(late[0]) == set(ALLOWED)
    done.set()


@linux_with_two_cores
def test_a_failed_run_gives_all_back(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), take_slot(CPU, timing(cores=2), Claims(tmp_path)):
        assert torch.get_num_threads() == 2
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads
    assert os.sched_getaffinity(0) == set(ALLOWED)
    assert Claims(tmp_path).uses() == []


MULTIRUN = """
import json, os, torch
from morphtrain.run import main
from morphtrain.trainer import train
from morphtrain.timing.clock import Clock
seen = []
original = Clock.step_done
def note():
    affinities = sorted({tuple(sorted(os.sched_getaffinity(int(t)))) for t in os.listdir("/proc/self/task")})
    state = [affinities, torch.get_num_threads()]
    if not seen or seen[-1] != state:
        seen.append(state)
def step_done(clock):
    note()
    original(clock)
Clock.step_done = step_done
torch.set_num_threads(2)
torch.randn(512, 512) @ torch.randn(512, 512)  # workers, before any run
note()
main()
note()
print(json.dumps(seen))
"""


@linux_with_two_cores
def test_runs_of_a_multirun_give_back_what_they_had(tmp_path: Path) -> None:
    """One process, three runs: one core, all, one core."""
    place = tmp_path / "tmp"
    place.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", MULTIRUN, "-m", *QUICK, "timing.cores=1,null,1"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(place), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    free, one = [[ALLOWED], 2], [[ALLOWED[:1]], 1]
    assert json.loads(result.stdout.splitlines()[-1]) == [free, one, free, one, free]
    assert {path.name for path in place.glob("morphtrain-*/*")} == {"lock"}


def shared_directory(tmp_path: Path) -> Path:
    """Where the runs of a command with TMPDIR=tmp_path keep their claims."""
    directory = tmp_path / f"morphtrain-{os.getuid()}"
    directory.mkdir(mode=0o700)
    return directory


def test_a_run_is_refused_beside_another(tmp_path: Path, command: Command) -> None:
    process = holder(shared_directory(tmp_path), next(iter(cores.allowed_cores())))
    result = command(*QUICK, "timing.when_busy=refuse", "hydra.run.dir=run", env={"TMPDIR": str(tmp_path)})
    process.communicate()
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for part in ("timing.when_busy=refuse", str(process.pid), "timing.when_busy=wait", "timing.cores"):
        assert part in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_waits_for_another(tmp_path: Path) -> None:
    process = holder(shared_directory(tmp_path), *cores.allowed_cores())
    run = subprocess.Popen(
        [sys.executable, "-m", "morphtrain.run", *QUICK, "timing.when_busy=wait", "hydra.run.dir=run"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert "waiting for a free slot" in run.stdout.readline()
    time.sleep(1)
    assert not (tmp_path / "run" / "last.pt").exists()
    process.communicate()
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 0
    assert "epoch    2/2" in out


def test_what_cleans_up_temporary_files_ends_no_run(tmp_path: Path) -> None:
    """It removes the claims in the middle of a run, which writes its own again."""
    claims = Claims(tmp_path / "claims")
    claim = claims.claim(lambda uses: ("core 0",))
    shutil.rmtree(tmp_path / "claims")
    assert claim.others() == []
    process = holder(tmp_path / "claims", "core 0")
    assert claim.others() == [process.pid]
    assert {use.pid for use in claims.uses()} == {process.pid, os.getpid()}
    shutil.rmtree(tmp_path / "claims")
    claim.release()
    assert claims.uses() == []
    process.communicate()


@pytest.mark.parametrize("junk", ["", "{", "[]", '{"pid": "x", "resources": []}', '{"pid": 1}', "\0\0"])
def test_junk_in_a_claim_is_left_out_with_one_warning(junk: str, tmp_path: Path, caplog: Any) -> None:
    claims = Claims(tmp_path)
    claim = claims.claim(lambda uses: ("core 0",))
    claim.path.write_text(junk)
    for _ in range(3):
        assert claims.uses() == []
    assert caplog.text.count("no claim of a run") == 1
    claim.release()


def test_a_directory_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert shared_claims().uses() == []
    assert (tmp_path / f"morphtrain-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    mine = os.getuid()
    monkeypatch.setattr(claims_module.os, "getuid", lambda: mine + 1)
    (tmp_path / f"morphtrain-{mine + 1}").mkdir()  # ours, while somebody else asks
    with pytest.raises(UserError, match=f"TMPDIR={tmp_path}"):
        shared_claims()


def slots(directory: str, allowed: int, keys: dict[str, object]) -> tuple[Any, ...]:
    """What a process of several takes of so many cores, or why it does not; and what is left in use afterwards."""
    names = {f"core {i}": frozenset({i}) for i in range(allowed)}
    claims, patch = Claims(Path(directory)), pytest.MonkeyPatch()
    patch.setattr(slot, "allowed_cores", lambda: names)
    patch.setattr(slot, "pinned", lambda cpus: contextlib.nullcontext())
    patch.setattr(slot, "POLL_SECONDS", 0.01)
    patch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        with take_slot(CPU, timing(**keys), claims) as taken:
            found: tuple[Any, ...] = (
                sorted(taken.cpus),
                torch.get_num_threads(),
                taken.claim.others(),
                len(taken.beside),
            )
            world.wait()
    except UserError as error:
        found = (str(error),)
    finally:
        patch.undo()
    world.wait()
    mine = world.gathered(os.getpid())
    return found, [use.resources for use in claims.uses() if use.pid in mine]


def test_processes_of_a_run_divide_the_cores_and_are_no_strangers(tmp_path: Path) -> None:
    """Disjoint shares of the same size, with as many threads; more processes than cores share them without harm."""
    (first, _), (second, _) = in_ranks(2, slots, str(tmp_path), 5, {"when_busy": "refuse"})
    assert (len(first[0]), len(second[0])) == (2, 2) and not {*first[0]} & {*second[0]}
    assert first[1:] == second[1:] == (2, [], 0)
    shared = [found for found, _ in in_ranks(3, slots, str(tmp_path), 2, {"when_busy": "refuse"})]
    assert [found[1:3] for found in shared] == [(1, [])] * 3
    assert sorted(found[3] for found in shared) == [0, 1, 1]
    own = [found for found, _ in in_ranks(2, slots, str(tmp_path), 4, {"cores": 1})]
    assert sorted(cpu for found in own for cpu in found[0]) == [0, 1]
    for found, left in in_ranks(2, slots, str(tmp_path), 4, {"cores": 3}):
        assert found == ("timing.cores=3: 2 processes may use only 4 together; 2 or null works",) and left == []


def test_no_process_holds_cores_while_another_waits_for_some(tmp_path: Path) -> None:
    """There is room for one of two, so that neither begins; with `wait` both do as soon as there is."""
    process = holder(tmp_path, "core 1")
    for found, left in in_ranks(2, slots, str(tmp_path), 2, {"when_busy": "refuse"}):
        assert found[0].startswith(f"timing.when_busy=refuse: core 1: in use by process {process.pid}; ") and left == []
    timer = threading.Timer(1.0, process.kill)
    timer.start()
    begun = time.monotonic()
    both = [found for found, _ in in_ranks(2, slots, str(tmp_path), 2, {"when_busy": "wait"})]
    assert time.monotonic() - begun > 0.9
    assert sorted(cpu for found in both for cpu in found[0]) == [0, 1]
    assert all(found[2] == [] for found in both)
    process.wait()


def with_one_gpu(directory: str, same: bool) -> tuple[str, int]:
    """What a process is told that sees one GPU, the same one as the others or another one; and what stays claimed."""
    patch, claims, said = pytest.MonkeyPatch(), Claims(Path(directory)), ""
    patch.setattr(slot, "_name", lambda device: f"cuda GPU-{0 if same else world.rank()}")
    try:
        with take_slot([torch.device("cuda", 0)], timing(), claims):
            world.wait()
    except UserError as error:
        said = str(error)
    finally:
        patch.undo()
    world.wait()
    return said, len(claims.uses())


def test_two_processes_with_the_same_gpu_are_refused_in_a_line(tmp_path: Path) -> None:
    """As NCCL would refuse them later, in many; each sees a single one, so that it cannot tell by itself."""
    assert in_ranks(2, with_one_gpu, str(tmp_path), False) == [("", 0)] * 2
    said = "device=cuda:0: ranks 0 and 1 have the same GPU (cuda GPU-0); let each see all GPUs of its host, or another"
    for found, left in in_ranks(2, with_one_gpu, str(tmp_path), True):
        assert found.startswith(said) and "\n" not in found and left == 0
