"""Several processes train one network: one run, one report, one message, however they were started."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Command
from mlflow.tracking import MlflowClient
from ranks import command_in_ranks
from torch import distributed

import morphtrain
from morphtrain import arguments, world
from morphtrain.errors import UserError
from morphtrain.evidence.__main__ import main as evidence_main
from morphtrain.evidence.records import read_records
from morphtrain.maxbatch import main as maxbatch_main
from morphtrain.processes import join, lead, local, order
from morphtrain.processes.place import LOCALHOST, Place, place
from morphtrain.processes.verdict import RankFailed
from morphtrain.trainer import build_run, devices

QUICK = (*SMALL, "timing.cores=1", "timing.reference=0")

FAILS = """
from morphtrain.errors import UserError
from morphtrain.method import Method

class Fails(Method):
    def after_epoch(self, run):
        raise UserError("widgets=3: two work")
"""

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SLURM = {
    "SLURM_PROCID": "4",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[08-09,11]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}


def test_the_environment_says_which_process_this_is() -> None:
    assert place({}) is None
    assert place(TORCHRUN) == Place(3, 4, 1, 2, "first", 29500, attempt=2, agent=True)
    assert place({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}) is None
    assert place(SLURM) == Place(4, 5, 0, 1, "node08", 11234, by="srun")
    assert place({**SLURM, "SLURM_STEP_ID": "1"}).port != 11234, "two steps of a job are two runs"
    assert place({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert place({**batch, "SLURM_NTASKS": "5"}) is None, "a batch script is one process"
    assert place({**SLURM, **TORCHRUN}).by == "torchrun"
    one_host = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0", "MASTER_ADDR": "10.0.0.1"}
    assert place(one_host).address == LOCALHOST


@pytest.mark.parametrize(
    ("nodes", "first"), [("a1", "a1"), ("a1,b2", "a1"), ("a[1,4-5],b", "a1"), ("n-[003-9]", "n-003")]
)
def test_the_first_host_of_a_list_of_slurms(nodes: str, first: str) -> None:
    assert place({**SLURM, "SLURM_STEP_NODELIST": nodes}).address == first


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "one"}, "RANK=one: must be a whole number"),
        ({"RANK": "4"}, "RANK=4: must be below WORLD_SIZE=4"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: missing"),
        ({"MASTER_PORT": ""}, "MASTER_PORT: missing"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: must be from 1 to 65535"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999: must be from 1 to 65535"),
    ],
)
def test_an_environment_that_makes_no_sense_is_named(changed: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        place({**TORCHRUN, **changed})


def test_a_node_that_slurm_does_not_count_is_named() -> None:
    with pytest.raises(UserError, match="SLURM_NODEID=3: must be below 3, the nodes of SLURM_STEP_TASKS_PER_NODE"):
        place({**SLURM, "SLURM_NODEID": "3"})


@pytest.mark.parametrize("command", [evidence_main, maxbatch_main])
def test_every_command_names_an_environment_that_makes_no_sense(
    command: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**TORCHRUN, "RANK": "one", "HYDRA_FULL_ERROR": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == "RANK=one: must be a whole number, as torchrun and srun set it"


@pytest.mark.parametrize("agent", [True, False])
def test_a_process_finds_the_place_that_it_was_started_with(agent: bool) -> None:
    for found in (Place(1, 2, 1, 2, LOCALHOST, 4711, 3, agent), Place(2, 4, 0, 2, "first", 4711, 0, agent)):
        assert place(found.environment()) == found


def test_a_restart_finds_nothing_of_the_attempt_before() -> None:
    listener = join.listening()
    here = Place(0, 2, 0, 2, LOCALHOST, listener.getsockname()[1])
    store = join.store_of(here, listener)
    store.set("order", "old")
    for attempt, found in ((0, True), (1, False)):
        later = replace(here, rank=1, attempt=attempt)
        assert join.store_of(later).check(["order"]) == found


def test_who_waits_in_vain_for_the_others_is_told_for_how_many_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order.time, "monotonic", iter((0.0, 0.0, 601.0, 601.0)).__next__)
    with pytest.raises(UserError, match="the processes have not met within 10 minutes; see whether"):
        order.give(distributed.HashStore(), 0, 1, lambda: None)


def test_who_waits_for_others_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Variables that another launcher has left announce processes that will never come."""
    monkeypatch.setattr(order, "NOTICE_SECONDS", 0.05)
    monkeypatch.setattr(order, "TIMEOUT", timedelta(seconds=0.3))
    with pytest.raises(UserError, match="the processes have not met within"):
        order.give(distributed.HashStore(), 1, 2, lambda: None)
    (message,) = caplog.messages
    assert message.startswith("waiting for 3 processes to come: ")
    assert "WORLD_SIZE" in message


def test_only_this_host_reaches_the_store_of_one_host() -> None:
    listener = join.listening()
    port = listener.getsockname()[1]
    store = join.store_of(Place(0, 2, 0, 2, LOCALHOST, port), listener)
    store.set("there", "yes")
    own = next(iter({info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)} - {LOCALHOST}), None)
    if own is not None:
        with pytest.raises(OSError, match=r"refused|reach"):
            socket.create_connection((own, port), timeout=2)
    with pytest.raises(UserError, match=f"MASTER_PORT={port}: "):
        join.listening(port)


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of two processes that torchrun has started: its directory, and what it left on the terminal."""
    directory = tmp_path_factory.mktemp("torchrun")
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "morphtrain.run")
    result = subprocess.run(
        [sys.executable, *start, *QUICK, "epochs=3", "hydra.run.dir=run"],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return directory, result


def test_torchrun_leaves_one_run_and_says_all_once(torchrun: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    directory, result = torchrun
    assert list(directory.rglob("records.jsonl")) == [directory / "run" / "records.jsonl"]
    assert re.findall(r"^epoch +(\d)/3 ", result.stdout, re.MULTILINE) == ["1", "2", "3"]
    assert result.stdout.count("first network") == result.stdout.count("run directory:") == 1
    assert "Traceback" not in result.stderr
    log = (directory / "run" / "run.log").read_text()
    assert log.count("epoch    1/3") == 1
    records = read_records(directory / "run")
    assert [(record["epoch"], record["processes"]) for record in records] == [(1, 2), (2, 2), (3, 2)]
    facts = json.loads((directory / "run" / "environment.json").read_text())
    assert (facts["processes"], facts["backend"], facts["hosts"]) == ("2", "gloo", facts["host"])


def test_torchrun_is_one_run_of_mlflow(torchrun: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    client = MlflowClient(f"sqlite:///{torchrun[0]}/mlflow.db")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in found] == ["FINISHED"]
    assert found[0].data.tags["processes"] == found[0].data.params["processes"] == "2"
    assert len(client.get_metric_history(found[0].info.run_id, "train_loss")) == 3


def test_each_run_of_a_multirun_starts_its_processes(command: Command, tmp_path: Path) -> None:
    env = {"OMP_NUM_THREADS": "1"}
    result = command("-m", *QUICK, "epochs=2", "tracking=none", "processes=1,2", "hydra.sweep.dir=jobs", env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [[record.get("processes") for record in read_records(tmp_path / "jobs" / job)] for job in "01"] == [
        [None, None],
        [2, 2],
    ]
    assert "2 runs of 2 configurations" in result.stdout
    assert "processes=2" in result.stdout


ERRORS = {
    "a key": (["nothing=1"], "nothing=1: no such key"),
    "a value": (["epochs=0"], "epochs=0: must be 1 or more"),
    "another number": (["processes=3"], "processes=3: torchrun has started 2 processes; 2 or null works"),
    "a multirun": (["-m", "seed=1,2"], "-m: a multirun is one process, and torchrun has started 2; "),
    "a sweep": (["+sweep=prunetrain"], "sweep: a multirun is one process, and torchrun has started 2; "),
    "the same one in all": (["methods=[{_target_: own_methods.Fails}]"], "widgets=3: two work"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_goes_wrong_is_said_once(case: str, tmp_path: Path) -> None:
    typed, message = ERRORS[case]
    (tmp_path / "own_methods.py").write_text(FAILS)
    first, second = command_in_ranks(2, [*QUICK, "tracking=none", *typed], tmp_path)
    assert (first.returncode, second.returncode) == (1, 1)
    assert second.stdout + second.stderr == ""
    (said,) = first.stderr.splitlines()
    assert said.startswith(message)


def test_what_only_shows_is_shown_once_and_waits_for_nobody(command: Command) -> None:
    for flag in ("--help", "--cfg=job"):
        for rank in range(2):
            shown = command(flag, env=Place(rank, 2, rank, 2, LOCALHOST, 1).environment())
            assert (shown.returncode, bool(shown.stdout), shown.stderr) == (0, rank == 0, "")


def test_other_commands_are_the_first_processs_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in Place(1, 2, 1, 2, LOCALHOST, 1).environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        evidence_main(["table", "nowhere"])
    assert (ended.value.code, capsys.readouterr()) == (0, ("", ""))
    monkeypatch.setenv("RANK", "0")
    assert evidence_main(["table", "nowhere"]) == 1
    assert "nowhere: no such directory" in capsys.readouterr().err


def test_a_config_may_be_shown_of_what_several_processes_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in Place(0, 2, 0, 2, LOCALHOST, 1).environment().items():
        monkeypatch.setenv(name, value)
    assert arguments.prepared(["--cfg", "hydra", "+sweep=prunetrain"])
    with pytest.raises(UserError, match=r"hydra\.mode: a multirun is one process"):
        arguments.prepared(["hydra.mode=MULTIRUN", "seed=1,2"])


def test_one_process_by_hand_is_no_several() -> None:
    config = morphtrain.compose(*SMALL, "processes=2")
    with pytest.raises(UserError, match=r"processes=2: must be 1 or null here; python -m morphtrain\.run starts"):
        build_run(config)
    with pytest.raises(UserError, match="processes=0: must be 1 or more"):
        morphtrain.compose("processes=0")
    lead.check_number(config, Place(0, 2, 0, 2, LOCALHOST, 1))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_siblings_end_with_the_block_whatever_happens() -> None:
    places = [Place(rank, 3, rank, 3, LOCALHOST, 9) for rank in (1, 2)]  # nobody keeps a store there
    started = local.Siblings(places)
    pids = [process.pid for process in started.processes]
    assert all(map(is_alive, pids))
    started.check()
    os.kill(pids[1], signal.SIGKILL)
    started.processes[1].wait()
    with pytest.raises(RankFailed, match="rank 2 of 3 has ended with code -9"):
        started.check()
    started.end()
    assert not any(map(is_alive, pids))


@pytest.mark.slow
def test_siblings_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import time\nfrom morphtrain.processes.local import Siblings\nfrom morphtrain.processes.place import Place\n"
        "others = Siblings([Place(1, 2, 1, 2, '127.0.0.1', 9)])\n"
        "print(others.processes[0].pid, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        assert is_alive(pid)
        run.kill()
    end = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < end, "it waits for nobody"
        time.sleep(0.05)


def test_processes_share_the_threads_that_one_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(8)
    try:
        with local.shared_threads(3) as threads:
            assert threads == torch.get_num_threads() == 2
        assert torch.get_num_threads() == 8
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        with local.shared_threads(3) as threads:
            assert (threads, torch.get_num_threads()) == (None, 8)
    finally:
        torch.set_num_threads(before)


GPUS = [torch.device("cuda", number) for number in range(2)]


def test_each_process_of_a_host_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in range(2):
        monkeypatch.setattr(world, "local", world.Local(rank, 2))
        found += devices._of_this_process(GPUS, "auto")
        assert devices._of_this_process(GPUS[:1], "cuda:0") == GPUS[:1], "all that its launcher lets it see"
        assert devices._of_this_process([], "auto") == []
    assert found == GPUS
    monkeypatch.setattr(world, "local", world.Local(0, 3))
    with pytest.raises(UserError, match="device=auto: 3 processes on a host with 2 GPUs; one each works"):
        devices._of_this_process(GPUS, "auto")
    monkeypatch.setattr(world, "local", world.Local())
    assert devices._of_this_process(GPUS, "auto") == GPUS


def test_more_processes_than_gpus_are_refused_and_than_cores_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cores = len(local.allowed_cores())
    local._check(cores, "cpu")
    assert caplog.messages == []
    local._check(cores + 1, "cpu")
    assert caplog.messages == [f"processes={cores + 1}: they share {cores} cores, and one process may be faster"]
    monkeypatch.setattr(devices, "possible_devices", lambda wanted: GPUS)
    local._check(2, "auto")
    with pytest.raises(UserError, match=r"processes=3: must be at most 2, the number of GPUs for device=auto; .*cpu"):
        local._check(3, "auto")


def test_runs_of_different_numbers_of_processes_are_told_apart() -> None:
    import pandas as pd

    from morphtrain.evidence import formats

    table = pd.DataFrame({"arm": ["a", "a", "a", "b", "b"], "processes": [2.0, 2.0, None, 2.0, 2.0]})
    assert formats.mixed_processes(table) == ["a: 2 runs in 2 processes and 1 run in one process"]
    assert formats.mixed_processes(table.drop(columns="processes")) == []
    assert formats.mixed(table) == []


FORKS = """
import multiprocessing, os, time
from morphtrain.processes.local import end_with_parent

end_with_parent()
time.sleep(0.5)  # the thread reads by now
worker = multiprocessing.get_context("fork").Process(target=print, args=("read",), daemon=True)
worker.start()
worker.join(20)
print("ended" if worker.exitcode == 0 else "hangs", flush=True)
if worker.exitcode is None:
    worker.kill()
time.sleep(60)
"""


def test_a_process_that_follows_can_fork_workers_and_ends_with_its_parent() -> None:
    """Workers that decode images close standard input, which a thread of the process that forks them reads."""
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert [process.stdout.readline() for _ in range(2)] == ["read\n", "ended\n"]
            process.stdin.close()
            assert process.wait(local.GRACE_SECONDS + 10) == 1
        finally:
            process.kill()
