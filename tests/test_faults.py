"""Whatever happens to one of several processes ends all of them in time, with one message, and no work is lost."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conftest import KILLED_RUN, SMALL
from postgres_server import free_port
from ranks import command_in_ranks, in_ranks
from test_resume import assert_same, ends
from torch import distributed

import morphtrain
from morphtrain import interrupts, world
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.processes import lead, peers, verdict, watch
from morphtrain.processes.connections import Connections
from morphtrain.processes.join import joined
from morphtrain.processes.place import LOCALHOST, Place
from morphtrain.processes.verdict import RankFailed, Report, Whereabouts
from morphtrain.trainer import checkpoint, checkpoint_file, train
from morphtrain.trainer.train import _start_or_resume

QUICK = (*SMALL, "epochs=4", "timing.cores=1", "timing.reference=0", "tracking=none", "hydra.run.dir=run")
TIMEOUT = 2  # process_timeout of runs in which one hangs or is stopped
DEATH, ERROR, LATE = 12, 12, 25  # seconds for a run of two seconds with such a fault, on a busy machine

# Each fault: how long the run may take, and what the message says, after who it is.
FAULTS = {
    "KILL": (DEATH, "has died without a word"),
    "crash": (DEATH, "has died without a word"),
    "leave": (DEATH, "has died without a word"),
    "STOP": (LATE, f"has not answered for {TIMEOUT} seconds"),
    "grip": (LATE, f"has not answered for {TIMEOUT} seconds"),
    "hang": (LATE, f"has kept the others waiting for {TIMEOUT} seconds, in "),
    "raise": (ERROR, "has failed with this error"),
    "mistake": (ERROR, "widgets=3: two work"),
    "exit": (ERROR, "has ended before the others could, with sys.exit(3)"),
}
MOMENTS = ("build:1", "step:20", "morph:3", "epoch:2")
FEW = [(1, "build:1", "exit"), (1, "step:20", "STOP")]
MANY = [
    *((rank, moment, fault) for rank in (0, 1) for moment in MOMENTS for fault in FAULTS),
    *((0, "write:2", fault) for fault in FAULTS),
]


def faulty(
    directory: Path, faults: dict[int, str], *typed: str, size: int = 2
) -> list[subprocess.CompletedProcess[str]]:
    """A run of several processes, in some of which something happens (killed_run.py)."""
    commands = {rank: [KILLED_RUN, fault] for rank, fault in faults.items()}
    return command_in_ranks(size, [*QUICK, *typed], directory, commands=commands)


@pytest.mark.parametrize(
    ("rank", "moment", "fault"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in MANY if case not in FEW)],
)
def test_a_fault_of_one_process_ends_all_with_one_message(rank: int, moment: str, fault: str, tmp_path: Path) -> None:
    seconds, message = FAULTS[fault]
    start = time.monotonic()
    ended = faulty(tmp_path, {rank: f"{moment}:{fault}"}, f"process_timeout={TIMEOUT}")
    assert time.monotonic() - start < seconds
    assert all(process.returncode for process in ended), [process.returncode for process in ended]
    said = "".join(process.stderr for process in ended)
    where = "" if (rank, fault) == (0, "mistake") else rf"rank {rank} on \S+ \(process \d+\):? "
    assert len(re.findall(f"^{where}{re.escape(message)}", said, re.MULTILINE)) == 1, said
    assert len(re.findall(r"^rank \d|^widgets|Error: |interrupted", said, re.MULTILINE)) == 1 + (fault == "raise"), said
    kept = tmp_path / "run" / "last.pt"
    assert not kept.exists() or torch.load(kept, weights_only=True)


@pytest.mark.parametrize(
    ("signals", "codes"),
    [
        ({1: "step:20:TERM"}, [143, 143]),
        pytest.param({0: "step:20:INT"}, [130, 130], marks=pytest.mark.slow),
        pytest.param({0: "step:20:TERM", 1: "step:20:TERM"}, [143, 143], marks=pytest.mark.slow),
        pytest.param({0: "epoch:2:INT", 1: "step:30:INT"}, [130, 130], marks=pytest.mark.slow),
        pytest.param({0: "write:2:TERM"}, [143, 143], marks=pytest.mark.slow),
        pytest.param({1: "build:1:TERM"}, [143, 143], marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_process_interrupts_all(signals: dict[int, str], codes: list[int], tmp_path: Path) -> None:
    start = time.monotonic()
    ended = faulty(tmp_path, signals)
    assert time.monotonic() - start < ERROR
    assert [process.returncode for process in ended] == codes
    said = "".join(process.stdout + process.stderr for process in ended)
    assert said.count("interrupted") == ("build:1:TERM" not in signals.values()), said
    assert re.search(r"^rank \d|Traceback", said, re.MULTILINE) is None


def test_a_restart_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
    short = ("epochs=2", "data.train_samples=128")
    assert [process.returncode for process in faulty(whole, {}, *short)] == [0, 0]
    assert all(process.returncode for process in faulty(killed, {1: "step:12"}, *short))
    assert [record["epoch"] for record in read_records(killed / "run")] == [1]
    assert [process.returncode for process in faulty(killed, {}, *short, "resume=auto")] == [0, 0]
    assert_same(ends(whole / "run"), ends(killed / "run"))


KILLS = ["write:1", "write:3", "renamed:2", "step:3", "step:17", "step:33", "step:50", "morph:2", "morph:5", "epoch:2"]


@pytest.mark.slow
def test_torchrun_restarts_ten_of_ten_to_the_same_bits(tmp_path: Path) -> None:
    """Rank 0 and rank 1 are killed in turns, at ten moments."""
    whole = tmp_path / "whole"
    whole.mkdir()
    assert [process.returncode for process in faulty(whole, {})] == [0, 0]
    for number, moment in enumerate(KILLS):
        directory = tmp_path / str(number)
        directory.mkdir()
        rank = 0 if moment.startswith(("write", "renamed")) else number % 2
        (directory / "once.py").write_text(ONCE.format(rank=rank, moment=moment, killed_run=KILLED_RUN))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "once.py"]
        result = subprocess.run(
            [sys.executable, *launch, *QUICK, "resume=auto"],
            cwd=directory,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, f"{moment} of rank {rank}: {result.stdout}{result.stderr}"
        assert (directory / "killed").exists(), f"{moment} of rank {rank} never came"
        assert len(re.findall(r"^rank \d", result.stderr, re.MULTILINE)) == 1, result.stderr
        assert_same(ends(whole / "run"), ends(directory / "run"))


ONCE = """
import os, pathlib, runpy, sys
if os.environ["RANK"] == "{rank}" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    pathlib.Path("killed").touch()
    sys.argv.insert(1, "{moment}")
    runpy.run_path("{killed_run}", run_name="__main__")
else:
    from morphtrain import run
    run.main()
"""


@pytest.mark.slow
def test_any_number_of_processes_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    # In the second run best.pt and previous.pt get their names before last.pt does.
    for size, rank, moment in ((2, 0, "renamed:1"), (1, 0, "renamed:3"), (3, None, "")):
        faults = {} if rank is None else {rank: moment}
        ended = faulty(tmp_path, faults, "resume=auto", "timing.cores=null", size=size)
        assert bool(ended[0].returncode) == bool(faults), ended[0].stderr
    records = read_records(tmp_path / "run")
    assert [(record["epoch"], record.get("processes")) for record in records] == [(1, 2), (2, None), (3, 3), (4, 3)]


# What the first process alone can read.


def resumed(run_dir: Path, *typed: str) -> Any:
    """What a process restores, the epoch and the weights, or the error; only the first one sees any checkpoint."""
    if world.rank() > 0:
        checkpoint_file.read = no_such_file
    config = morphtrain.compose(*QUICK, *typed, "processes=2")
    try:
        run, _ = _start_or_resume(config, run_dir, torch.device("cpu"))
    except UserError as error:
        return str(error)
    return run.epoch, {name: tensor.tolist() for name, tensor in run.model.state_dict().items()}


def no_such_file(path: Path, name: str) -> NoReturn:
    raise UserError(f"{name}: this host does not have it")


def resumed_each(run_dirs: list[Path], typed: list[list[str]]) -> list[Any]:
    return [resumed(run_dir, *some) for run_dir, some in zip(run_dirs, typed, strict=True)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two epochs."""
    directory = tmp_path_factory.mktemp("trained")
    train(morphtrain.compose(*QUICK, "epochs=2"), directory, {})
    return directory


READ = ("resume=auto", "resume={}/last.pt", "architecture={}/last.pt")


def test_the_first_process_alone_reads_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    typed = [[key.format(trained), "epochs=2"] for key in READ]
    first, second = in_ranks(2, resumed_each, [trained, tmp_path, tmp_path], typed)
    assert first == second
    assert [epoch for epoch, _ in first] == [2, 2, 0]
    stored = checkpoint.Checkpoint(trained / "last.pt").content["model"]
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    for _, weights in first:
        assert {name: torch.tensor(values).shape for name, values in weights.items()} == shapes
    assert first[0] == first[1] and first[0][1] == {name: tensor.tolist() for name, tensor in stored.items()}


def test_a_damaged_checkpoint_is_the_same_message_everywhere(trained: Path, tmp_path: Path) -> None:
    stored = (trained / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(stored[:-200] + bytes(200))
    first, second = in_ranks(2, resumed, tmp_path, "resume=auto", "epochs=2")
    assert first == second
    assert "damaged" in first


# The watch itself.


class Pair:
    """The watches of two processes, in this one."""

    def __init__(self, seconds: float = 60, address: str = LOCALHOST) -> None:
        store = distributed.HashStore()
        places = [Place(rank, 2, rank, 2, address, 1) for rank in range(2)]
        self.first, self.second = (watch.Watch(place, seconds, world.Progress()) for place in places)
        connecting = threading.Thread(target=self.first.connect, args=(store,))
        connecting.start()
        self.second.connect(store)
        connecting.join()
        self.port, self.token = json.loads(store.get(peers.KEY))

    def judged(self) -> Report | None:
        """The verdict of the first, once there is one, or after some seconds."""
        end = time.monotonic() + 5
        while self.first.verdict is None and time.monotonic() < end:
            time.sleep(0.01)
        return self.first.verdict

    def verdicts(self, seconds: float = 5) -> tuple[Report | None, Report | None]:
        """Both, once there is one, or after some seconds."""
        end = time.monotonic() + seconds
        while (self.first.verdict is None or self.second.verdict is None) and time.monotonic() < end:
            time.sleep(0.01)
        return self.first.verdict, self.second.verdict


@contextmanager
def pair(seconds: float = 60, address: str = LOCALHOST) -> Iterator[Pair]:
    with interrupts.shared(lambda number: None):
        both = Pair(seconds, address)
        yield both
        both.second.close()
        both.first.close()


@pytest.fixture
def quick_hearts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of the watch takes a tenth of one."""
    for name in ("BEAT_SECONDS", "GRACE_SECONDS"):
        monkeypatch.setattr(watch, name, 0.1)


@pytest.mark.usefixtures("quick_hearts")
@pytest.mark.parametrize(
    ("reports", "counts"),
    [
        ([Report("lost", 0, "Connection closed"), Report("died", 1)], "died"),
        ([Report("interrupted", 0, number=15), Report("died", 1)], "died"),
        ([Report("lost", 0, "Connection closed"), Report("interrupted", 1, number=15)], "interrupted"),
        ([Report("lost", 0, "Connection closed"), Report("perhaps", 1, "RuntimeError")], "perhaps"),
        ([Report("lost", 0, "Connection closed")], "lost"),
        ([Report("mistake", 1, "widgets=3"), Report("died", 0)], "mistake"),
    ],
)
def test_the_cause_counts_and_not_what_follows_from_it(reports: list[Report], counts: str) -> None:
    with pair() as both:
        for report in reports:
            (both.first, both.second)[report.rank]._hear(report)
            if report.kind in ("mistake", "perhaps"):
                time.sleep(0.05)  # it has to arrive
        first, second = both.verdicts()
    assert first is not None
    assert first == second
    assert first.kind == counts


@pytest.mark.usefixtures("quick_hearts")
def test_a_process_may_be_busy_for_longer_than_others_may_wait() -> None:
    with pair(seconds=0.3) as both:
        assert both.verdicts(seconds=0.8) == (None, None), "nobody waits"
        both.first.progress.begun, both.first.progress.inside = 1, True
        late, _ = both.verdicts(seconds=5)
    assert late is not None
    assert (late.kind, late.rank) == ("hung", 1)
    assert "test_faults.py" in late.text or "line" in late.text


@pytest.mark.usefixtures("quick_hearts")
def test_a_pause_of_all_processes_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a machine that is suspended, or of Ctrl-Z."""
    monkeypatch.setattr(watch.Watch, "_kill", lambda *_: None)  # both are this process
    with pair(seconds=0.5) as both:
        with both.first._lock, both.second._lock:
            time.sleep(1.2)
        assert both.verdicts(seconds=0.3) == (None, None)
        with both.second._lock:  # and of one it is
            assert both.judged() == Report("silent", 1, seconds=0.5)


@pytest.mark.usefixtures("quick_hearts")
def test_processes_that_wait_for_each_other_are_told_of_the_network() -> None:
    with pair(seconds=0.3) as both:
        for one in (both.first, both.second):
            one.progress.begun, one.progress.inside = 3, True
        found, _ = both.verdicts()
        assert found is not None
        assert found.kind == "stalled"
        assert "GLOO_SOCKET_IFNAME" in found.message(None)


@pytest.mark.usefixtures("quick_hearts")
def test_strangers_are_ignored() -> None:
    with pair() as both:
        lines = [b"GET / HTTP/1.1\r\n\r\n", b'{"token": "guessed", "rank": 1}\n', b"[1, 2]\n", b""]
        lines += [b"[" * 200_000 + b"\n", '{"token": "gäu"}\n'.encode(), b'{"token": "\\ud800"}\n']
        for said in lines:
            with socket.create_connection((LOCALHOST, both.port), timeout=5) as stranger:
                stranger.sendall(said)
                if said:
                    assert stranger.recv(1) == b"", "the line is closed"
        assert both.verdicts(seconds=0.3) == (None, None)
        both.second.peers[0].line.end()
        assert both.judged() == Report("died", 1), "it still watches"


@pytest.mark.usefixtures("quick_hearts")
def test_the_end_of_a_line_without_a_word_is_a_death_and_after_one_is_none() -> None:
    with pair() as both:
        both.second.peers[0].line.send(parting=True)
        both.second.peers[0].line.end()
        time.sleep(0.3)
        assert both.first.verdict is None
    with pair() as both:
        both.second.peers[0].line.end()
        assert both.judged() == Report("died", 1)


def test_the_processes_of_one_host_watch_each_other_inside_it_wherever_their_store_is() -> None:
    with pair(address="nowhere.invalid") as both:
        assert both.first.peers._listener is not None
        assert both.first.peers._listener.getsockname()[0] == LOCALHOST


def test_a_process_that_has_ended_before_it_is_there_is_not_waited_for() -> None:
    def check() -> None:
        raise RankFailed("rank 1 of 2 has ended with code -9")

    alone = watch.Watch(Place(0, 2, 0, 2, LOCALHOST, 1), 60, world.Progress())
    with interrupts.shared(lambda number: None), pytest.raises(RankFailed, match="code -9"):
        alone.connect(distributed.HashStore(), check)
    alone.close()


def test_a_process_ends_by_force_where_nobody_reads_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any) -> NoReturn:
        raise BrokenPipeError

    alone = watch.Watch(Place(0, 2, 0, 2, LOCALHOST, 1), 60, world.Progress())
    monkeypatch.setattr(os, "write", closed)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for report in (Report("mistake", 1, "no such file: \udcff"), Report("interrupted", 1, number=15)):
        alone.verdict = report
        with pytest.raises(SystemExit):
            alone._end_by_force()
    alone.close()


def test_a_forked_child_does_not_keep_a_dead_process_s_lines_open() -> None:
    """As the workers of a data loader are, which outlive a process that is killed."""
    with pair() as both:
        line = both.second.peers[0].line
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        try:
            line.close()
            assert both.judged() == Report("died", 1)
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


def test_who_waits_in_a_connection_that_is_cut_gets_an_error() -> None:
    listener = socket.create_server((LOCALHOST, 0))
    made = Connections()
    with made.noticed():
        one = socket.create_connection(listener.getsockname())
        two = socket.create_server((LOCALHOST, 0))
    other, _ = listener.accept()
    threading.Timer(0.1, made.cut).start()
    one.settimeout(5)
    assert one.recv(1) == b""
    assert other.recv(1) == b""
    socket.create_connection(two.getsockname(), timeout=1).close()  # a listener is none that others wait in
    made.close()
    for end in (one, two, other, listener):
        end.close()


MESSAGES: dict[str, Callable[[], BaseException]] = {
    verdict.INTERRUPTED: lambda: interrupts.Interrupted(15),
    verdict.EXITED: lambda: SystemExit("no more"),
    verdict.MISTAKE: lambda: UserError("seed=-1: must be 0 or more"),
    verdict.PERHAPS: lambda: RuntimeError("{braces}"),
    verdict.RAISED: lambda: KeyError("gone"),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_way_to_end_has_a_report(kind: str) -> None:
    report = verdict.of_error(3, MESSAGES[kind]())
    assert (report.kind, report.rank) == (kind, 3)
    if kind == verdict.INTERRUPTED:
        assert report.number == 15
        return
    message = report.message(Whereabouts("there", 0, 4711))
    assert "rank 3 on there (process 4711)" in message
    assert any(text in message for text in ("no more", "seed=-1", "{braces}", "'gone'"))


def watched(port: int, fails_in: int) -> str:
    """A watched block in which one process fails while the other waits for it in a sum."""
    here = Place(world.rank(), world.size(), world.rank(), world.size(), LOCALHOST, port)
    store = distributed.TCPStore(LOCALHOST, port, world.size(), here.rank == 0, wait_for_workers=False)
    distributed.destroy_process_group()
    try:
        with watch.over(here, store, 60), joined(here, store, 60):
            if here.rank == fails_in:
                raise ZeroDivisionError("no widgets")
            world.sum_([torch.ones(3)])
    except RankFailed as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_a_process_that_fails_raises_its_error(rank: int) -> None:
    for found in in_ranks(2, watched, free_port(), rank):
        assert re.search(rf"^rank {rank} on \S+ \(process \d+\) has failed with this error", found, re.MULTILINE)
        assert "ZeroDivisionError: no widgets" in found


@pytest.mark.parametrize(
    ("restarts", "resume", "warned"), [("3", "never", True), ("3", "auto", False), ("0", "never", False)]
)
def test_restarts_that_lose_all_are_warned_of(
    restarts: str, resume: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    lead.warn_of_restarts(morphtrain.compose(*SMALL, f"resume={resume}"))
    assert ("resume=auto and a hydra.run.dir" in caplog.text) == warned
