"""Experiments through the real command: order, what goes on, what is repeated, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import KILLED_RUN, Answer, Command
from fork_server import ForkServer
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from test_experiments_conf import composed

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.evidence import experiment as evidence
from morphtrain.evidence.experiment import Arm, Experiment
from morphtrain.experiment import declaration, sweeper
from morphtrain.experiment.display import Clock
from morphtrain.experiment.runs import (
    DISTURBED,
    Run,
    contended,
    epochs_in_the_same_seconds,
    planned,
    ready,
)
from morphtrain.experiment.sweeper import ArmsSweeper, _quoted
from morphtrain.report.build import read

DECLARED = """
# @package _global_
defaults:
  - /size: small

hydra:
  sweeper:
    question: Does it pay?
    analysis: pays
    margin: 0.01
    sizes:
      small:
        seeds: [1, 2]
        overrides:
          - data=synthetic
          - data.train_samples=1024
          - data.val_samples=64
          - data.image_size=8
          - model.width=4
          - batch_policy.batch_size=32
          - epochs=3
          - timing.reference=1  # measured again in any run, so that a busy machine spoils none
    arms:
      dense: {role: dense}
      sooner: {role: sooner, epochs: 0.5}
      pruned: {overrides: [prune=prunetrain, prune.interval=1, prune.start_epoch=1, prune.lasso_ratio=60]}
      scratch: {role: from_scratch, of: pruned}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory with an experiment of the user's own, `quick`."""
    folder = tmp_path / "own" / "experiment"
    folder.mkdir(parents=True)
    (folder / "quick.yaml").write_text(DECLARED.strip())
    return tmp_path


TYPED = ("--config-dir=own", "+experiment=quick", "tracking=none")


def refusal(answer: Answer, *arguments: str) -> str:
    """The one line with which the command ends that is typed so."""
    said = answer(*TYPED, *arguments)
    assert "\n" not in said
    return said


def histories(directory: Path) -> dict[str, list[dict[str, float]]]:
    return {
        f"{path.parent.parent.name}/{path.parent.name}": [json.loads(line) for line in path.read_text().splitlines()]
        for path in directory.rglob("records.jsonl")
    }


def test_an_experiment_runs_goes_on_and_refuses_to_change(
    own: Path, command: Command, fork_server: ForkServer, answer: Answer
) -> None:
    directory = own / "experiments" / "quick-small"
    words, undisturbed = [KILLED_RUN, "never:0", *TYPED], {"UNDISTURBED": "1"}
    env = {**os.environ, **undisturbed}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen([sys.executable, *words], cwd=own, env=env, **pipes)
    while not list(directory.glob("2/*/last.pt")):  # somewhere in the second seed
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    declared = evidence.load(directory)
    assert declared.seeds == (1, 2)
    assert declared.arms["sooner"].overrides == ("epochs=2",), "half of three, rounded"
    before = histories(directory)
    assert {name for name in before if name.startswith("1/")} == {"1/dense", "1/sooner", "1/pruned", "1/scratch"}
    stamps = {path: path.stat().st_mtime_ns for path in directory.glob("1/*/last.pt")}

    second = fork_server.run(words, own, undisturbed)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "of 8" not in second.stderr
    assert second.stdout.rstrip().endswith("python -m morphtrain.report experiments/quick-small")
    found = f"answer: {read(directory, directory.parent).answer}"
    assert found in second.stdout
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "what has ended is not run again"
    after = histories(directory)
    assert len(after) == 8
    assert all(len(history) == 3 for name, history in after.items() if name.endswith(("dense", "pruned")))
    for seed in "12":
        pruned, scratch = after[f"{seed}/pruned"], after[f"{seed}/scratch"]
        assert len(scratch) == epochs_in_the_same_seconds(pruned)
        assert scratch[0]["params"] == pruned[-1]["params"]
    assert len({history[0]["train_loss"] for name, history in after.items() if name.endswith("dense")}) == 2
    assert found in command(*TYPED).stdout, "of an experiment that has ended, too"

    for change, difference in (("epochs=6", "epochs=3"), ("seed=1,2,3", "seeds=[1, 2]")):
        refused = refusal(answer, change)
        assert "experiment.yaml: the experiment was begun with " in refused
        assert difference in refused and "hydra.sweep.dir" in refused
    assert histories(directory) == after


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("size=thesis",), "size=thesis: must be one of small"),
        (("resume=auto",), "resume=auto: an experiment sets resume by itself"),
        (("chosen={precision:bf16}",), "chosen={precision:bf16}: an experiment sets chosen by itself"),
        (("prune=none",), "prune=none: arm pruned of the experiment has a value of its own"),
        (("epochs=1,2",), "epochs=1,2: an experiment has its arms in its file"),
        (("seed=x",), "seed=x: must be 0 to 4294967295"),
        (("epochs=1",), "is the same run as"),
        (("seed=1,1",), "seed=[1, 1]: must be one or more different seeds"),
        (("hydra.sweeper.y=speed",), "hydra.sweeper.y=speed: must be one of"),
        (("hydra.sweeper.x=''",), "hydra.sweeper.x=: must be a metric"),
        (("hydra.sweeper.response=speed",), "hydra.sweeper.response=speed: must be one of"),
        (("hydra.sweeper.attempts=0",), "hydra.sweeper.attempts=0: must be 1 or more"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(
    arguments: tuple[str, ...],
    said: str,
    own: Path,
    answer: Answer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert said in refusal(answer, *arguments)
    assert not list(own.glob("experiments/*/*"))


def experiment(arms: dict[str, Arm], seeds: tuple[int, ...] = (1, 2, 3, 4, 5)) -> Experiment:
    return Experiment("e", "small", "Is it?", "", "factor", "params", arms, seeds, 0.1)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("    question: Does it pay?\n", "", "hydra.sweeper.question: "),
        ("# @package", "# momentum.yaml\n# @package", "its first line is `# @package _global_`"),
        ("prune.interval=1,", "prune.interval=0,", "arm pruned: prune.interval=0: must be"),
        ("margin: 0.01", "margin: 0.01\n    marign: 0.02", "hydra.sweeper.marign=0.02: no such key"),
        ("margin: 0.01", "margin: much", "hydra.sweeper.margin=much: must be a number"),
        ("{role: dense}", "{role: dense, rule: 1}", "hydra.sweeper.arms.dense.rule=1: no such key"),
        ("epochs: 0.5", "epochs: -1", "hydra.sweeper.arms.sooner.epochs=-1.0: must be above 0"),
        ("seeds: [1, 2]", "seeds: some", "hydra.sweeper.sizes.small.seeds=some: must be a list"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "hydra.sweeper.sizes.small.seeds=[1, 1]: must be one or more different"),
        ("seeds: [1, 2]", "seeds: [1, -2]", "hydra.sweeper.sizes.small.seeds=[1, -2]: must be one or more different"),
        ("{role: dense}", "{role: king}", "hydra.sweeper.arms.dense.role=king: must be one of method, dense"),
        ("{role: dense}", "false", "hydra.sweeper.arms.dense=false: must be keys with values"),
        ("{role: dense}", "3", "hydra.sweeper.arms.dense=3: must be keys with values"),
        ("of: pruned", "of: dense", "hydra.sweeper.arms.scratch.of=dense: must be the name of a method's arm"),
    ],
)
def test_a_file_that_declares_no_experiment_is_refused(
    before: str, after: str, said: str, own: Path, answer: Answer
) -> None:
    path = own / "own" / "experiment" / "quick.yaml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    assert said in refusal(answer)


@pytest.mark.parametrize(("epochs", "at"), [(4, 2), (24, 12), (180, 90)])
def test_growth_at_a_share_of_the_epochs_follows_them(epochs: int, at: int) -> None:
    with initialize_config_dir(str(schema.CONF)):
        given = declaration.typed(["+experiment=net2net_wider", f"epochs={epochs}"])
        config = compose("config", ["+experiment=net2net_wider"], return_hydra_config=True)
        keys: Any = OmegaConf.to_container(config.hydra.sweeper)
        del keys["_target_"]  # as Hydra does to make the sweeper
        found = declaration.declared("net2net_wider", keys, given, composed)
        config = composed([*found.overrides, *found.arms["wider"].overrides])
        assert schema.parse(config).grow.at_epochs == [at]
    assert not any(override.startswith("grow") for override in found.arms["wider_from_scratch"].overrides)


def test_what_a_run_warns_of_is_printed_once_for_each_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = planned(experiment({"a": Arm(role="dense"), "b": Arm()}, (1, 2)), tmp_path)
    clock = Clock(4, 4)
    for run in runs:
        run.directory.mkdir(parents=True)
        (run.directory / "records.jsonl").write_text(json.dumps(record(epoch=1, params=1.0)) + "\n")
        lines = [
            "INFO epoch 1/4",
            f"WARNING ratio=7: limited to 2.{run.number}",
            f"WARNING ratio=8: limited to {run.number}",
        ]
        said = "".join(f"2026-01-31 12:00:00,123 {line}\n" for line in lines[: 1 if run.arm == "a" else 3])
        (run.directory / "run.log").write_text(said)
        clock.show(run, "params", None, False)
    (first,) = (run for run in runs if run.seed == 1 and run.arm == "b")
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert said == [f"warning of b: ratio=7: limited to 2.{first.number}"]


@pytest.mark.slow
def test_an_experiment_of_runs_in_two_processes(own: Path, fork_server: ForkServer) -> None:
    result = fork_server.run([KILLED_RUN, "never:0", *TYPED, "processes=2"], own, {"UNDISTURBED": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    found = histories(own / "experiments" / "quick-small")
    assert len(found) == 8
    assert {record["processes"] for history in found.values() for record in history} == {2}


ARMS = {"a": Arm(role="dense"), "b": Arm(), "c": Arm(), "c_again": Arm(role="from_scratch", of="c"), "d": Arm()}


def test_arms_of_a_seed_lie_side_by_side_in_an_order_by_chance(tmp_path: Path) -> None:
    runs = planned(experiment(ARMS), tmp_path)
    assert [run.number for run in runs] == list(range(25))
    assert [run.seed for run in runs] == [seed for seed in (1, 2, 3, 4, 5) for _ in ARMS]
    orders = [tuple(run.arm for run in runs if run.seed == seed) for seed in (1, 2, 3, 4, 5)]
    assert all(sorted(order) == sorted(ARMS) for order in orders)
    assert len(set(orders)) > 1, "no arm is always the first of its seed"
    assert planned(experiment(ARMS), tmp_path) == runs, "the same when the command is typed again"
    for run in runs:
        assert (run.after is not None) == (run.arm == "c_again")
        assert run.after is None or (run.after.arm, run.after.seed) == ("c", run.seed)
        assert run.directory == tmp_path / str(run.seed) / run.arm


def record(**values: float) -> dict[str, float]:
    return {"epoch": 1, "changed": 0.0, "contended": 0.0, **values}


def trained(*epochs: tuple[float, float], changes: Sequence[int] = (), beside: float = 0.0) -> list[dict[str, float]]:
    """The records of a run: the seconds of its epochs, and those of a step of the reference that were measured then."""
    history: list[dict[str, float]] = []
    clock = calibrated = beside
    for number, (seconds, reference) in enumerate(epochs, 1):
        clock, calibrated = clock + seconds, calibrated + seconds / reference
        times = {"epoch_seconds": seconds, "calibrated_seconds": seconds / reference, "reference_seconds": reference}
        sums = {"train_seconds": clock, "calibrated_train_seconds": calibrated}
        history.append(record(epoch=number, changed=float(number in changes), **times, **sums))
    return history


def test_epochs_from_scratch_take_the_seconds_of_the_whole_run() -> None:
    """Ten epochs of 1.5 s, and after a change ten of 0.5 s, with set-up and the change itself: 40 and 4 of the last."""
    slow, fast = [(1.5, 1.0)] * 10, [(0.5, 1.0)] * 10
    assert epochs_in_the_same_seconds(trained(*slow, *fast, changes=[10])) == 40
    assert epochs_in_the_same_seconds(trained(*slow, *fast, changes=[10], beside=2.0)) == 44
    assert epochs_in_the_same_seconds(trained(*slow)) == 10
    assert epochs_in_the_same_seconds(trained(*[(0.1, 1.0)] * 3)) == 3, "whatever a sum of tenths is"
    assert epochs_in_the_same_seconds([record(epoch_seconds=9.0, train_seconds=3.0)]) == 1
    assert epochs_in_the_same_seconds(trained((1.0, 1.0), (2.0, 1.0), changes=[2])) == 1, "as long as the last one"


def test_a_machine_that_slows_down_meanwhile_changes_nothing() -> None:
    speeds = [1 + 0.1 * number for number in range(20)]  # the last epoch takes nearly three times as long
    drifting = [(seconds * speed, speed) for seconds, speed in zip([1.5] * 10 + [0.5] * 10, speeds, strict=True)]
    assert epochs_in_the_same_seconds(trained(*drifting, changes=[10])) == 40
    once = trained(*[(seconds, 1.0) for seconds, _ in drifting], changes=[10])
    assert epochs_in_the_same_seconds(once) < 30, "a machine measured once has no speed to allow for"


@pytest.mark.parametrize("disturbed", [[3], [15], [2, 3, 12, 18]])
def test_epochs_that_were_disturbed_or_badly_calibrated_change_nothing(disturbed: list[int]) -> None:
    """Twelve times as long, or measured at another moment than trained: neither the sum nor the epoch may move."""
    epochs = [(1.5, 1.0)] * 10 + [(0.5, 1.0)] * 10
    for number in disturbed:
        epochs[number] = (12 * epochs[number][0], 1.01 if number % 2 else 0.2)
    assert epochs_in_the_same_seconds(trained(*epochs, changes=[10])) == 40
    raw = [{**r, "calibrated_train_seconds": 99.0} for r in trained(*[(s, 1.0) for s, _ in epochs], changes=[10])]
    assert epochs_in_the_same_seconds(raw) == 40


def test_a_run_counts_as_contended_unless_the_machine_was_measured_again() -> None:
    epochs = [(1.0, 1.0), (1.0, 1.0)]
    disturbed = {"contended": 1.0}
    once, twice = ([{**r, **disturbed} for r in trained(*epochs[:1], (1.0, then))] for then in (1.0, 2.0))
    assert contended(once)
    assert not contended(twice)
    assert not contended(trained(*epochs)), "nothing has disturbed it"
    never = [record(contended=1.0), record()]
    assert contended(never)


class Jobs:
    """A launcher whose jobs leave records at once; `plan` says how the next runs of an arm end."""

    def __init__(self, plan: dict[str, list[Any]], chooses: bool = False) -> None:
        self.plan, self.started, self.chooses = plan, [], chooses  # type: ignore[var-annotated]
        self.launches: list[int] = []  # how many jobs at once

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        self.launches.append(len(jobs))
        return [self._run(dict(job.split("=", 1) for job in jobs)) for jobs in jobs]

    def _run(self, job: dict[str, str]) -> JobReturn:
        subdir = job["hydra.sweep.subdir"].strip("'")
        directory = Path(job["hydra.sweep.dir"].strip("'"), subdir)
        arm = directory.name
        self.started.append((subdir, job, (directory / DISTURBED).exists()))
        directory.mkdir(parents=True, exist_ok=True)
        if self.chooses:
            chosen = job["chosen"].strip("{}") if "chosen" in job else f"precision:its_own_{len(self.started)}"
            (directory / "environment.json").write_text(json.dumps(dict([chosen.split(":")])))
        how = self.plan.get(arm, []).pop(0) if self.plan.get(arm) else "well"
        values = record(epoch_seconds=1.0, train_seconds=7.0, params=5.0, contended=float(how == "contended"))
        (directory / "records.jsonl").write_text(json.dumps(values) + "\n")
        if isinstance(how, Exception):
            return JobReturn(status=JobStatus.FAILED, _return_value=how)
        (directory / "run.png").touch()
        return JobReturn(status=JobStatus.COMPLETED, _return_value=1.0)


def swept(
    directory: Path,
    plan: dict[str, list[Any]],
    at_once: bool = False,
    seeds: tuple[int, ...] = (1,),
    declared: Experiment | None = None,
) -> tuple[Jobs, dict[Run, str], list[Run]]:
    """Run an experiment with such jobs: the launcher, what failed, and all runs."""
    sweeper = ArmsSweeper({"attempts": 3})
    sweeper.directory, sweeper.one_at_a_time = directory, not at_once
    logging = OmegaConf.create({"version": 1, "root": None})  # leaves pytest's as it is
    sweeper.config = SimpleNamespace(hydra=SimpleNamespace(hydra_logging=logging, verbose=False))
    sweeper.hydra_context = SimpleNamespace(execution_whitelist=None)
    declared = declared or experiment(ARMS, seeds)
    jobs = Jobs(plan, chooses="precision=auto" in declared.overrides)
    sweeper.launcher = jobs
    runs = planned(declared, directory)
    failures = sweeper.run_all(declared, runs, declaration.Typed((), (), None), None)
    return jobs, failures, runs


@pytest.mark.parametrize("at_once", [False, True], ids=["one at a time", "a seed at once"])
@pytest.mark.parametrize("first", [OSError("disk"), "contended"], ids=["failed", "contended"])
def test_what_was_spoilt_is_run_again_from_the_beginning(first: Any, at_once: bool, tmp_path: Path) -> None:
    jobs, failures, runs = swept(tmp_path, {"b": [first, first]}, at_once)
    assert failures == {}
    assert all(run.ended for run in runs)
    started = [subdir for subdir, _, _ in jobs.started]
    assert started.count("1/b") == 3
    assert len(started) == len(ARMS) + 2
    assert not any(spoilt for _, _, spoilt in jobs.started), "nothing of it is left to go on from"
    assert not list(tmp_path.rglob(DISTURBED))
    (scratch,) = [job for subdir, job, _ in jobs.started if subdir == "1/c_again"]
    assert scratch["epochs"] == "7"
    assert scratch["architecture"] == f"'{tmp_path / '1/c/last.pt'}'"
    assert started.index("1/c_again") > started.index("1/c")


def test_mlflow_is_told_of_a_disturbed_attempt_and_of_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Path] = []
    monkeypatch.setattr(sweeper, "mark_disturbed", lambda config, run_dir: told.append(run_dir))
    swept(tmp_path, {"b": ["contended"], "c": [RuntimeError("broken")]})
    assert told == [tmp_path / "1/b"]


@pytest.mark.parametrize("how", [RuntimeError("broken"), "contended"], ids=["failed", "contended"])
def test_what_is_spoilt_every_time_counts_for_nothing(how: Any, tmp_path: Path) -> None:
    jobs, failures, _ = swept(tmp_path, {"c": [how] * 9})
    assert [str(run) for run in failures] == ["seed 1 c", "seed 1 c_again"]
    assert [subdir for subdir, _, _ in jobs.started].count("1/c") == 3
    assert not (tmp_path / "1/c/records.jsonl").exists(), "a loader finds no records of it"
    assert (tmp_path / "1/c" / DISTURBED).exists()
    disturbed = "others disturbed its times: timing.reference=0 calibrates none; a quiet machine would do"
    why = disturbed if how == "contended" else "broken"
    with pytest.raises(UserError, match=f"^2 of 9 runs failed, as seed 1 c: .*{why}; the same command repeats them, "):
        sweeper.check_failures(failures, 9)
    again, failures, _ = swept(tmp_path, {})
    assert failures == {}
    assert [subdir for subdir, _, _ in again.started] == ["1/c", "1/c_again"]


def test_a_mistake_is_not_repeated_but_the_other_arms_run(tmp_path: Path) -> None:
    jobs, failures, runs = swept(tmp_path, {"b": [UserError("optimizer.lr=9: training diverged")] * 3})
    assert {str(run): why for run, why in failures.items()} == {"seed 1 b": "optimizer.lr=9: training diverged"}
    assert [subdir for subdir, _, _ in jobs.started].count("1/b") == 1
    assert sum(run.ended for run in runs) == len(ARMS) - 1


def test_if_no_arm_can_run_it_ends_after_the_first_seed(tmp_path: Path) -> None:
    missing = [UserError("data.root=data: there is no CIFAR10")]
    jobs, failures, _ = swept(tmp_path, {arm: list(missing) for arm in ARMS}, seeds=(1, 2))
    assert {str(run).split()[1] for run in failures} == {"1"}
    assert len(failures) == len(ARMS)
    assert len(jobs.started) == len(ARMS) - 1, "what waits for another arm is not tried"


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Records without the picture of the end: neither ended nor spoilt."""
    (tmp_path / "1/a").mkdir(parents=True)
    (tmp_path / "1/a/records.jsonl").write_text(json.dumps(record()) + "\n")
    (tmp_path / "1/a/last.pt").write_text("kept")
    jobs, _, _ = swept(tmp_path, {})
    (job,) = [job for subdir, job, _ in jobs.started if subdir == "1/a"]
    assert job["resume"] == "auto"
    assert (tmp_path / "1/a/last.pt").read_text() == "kept"


def test_a_disturbed_run_that_nobody_looked_at_is_spoilt(tmp_path: Path) -> None:
    """Its command was killed between its end and the look at its records."""
    runs = planned(experiment(ARMS, (1,)), tmp_path)
    for run, disturbed in zip(runs[:2], (0.0, 1.0), strict=True):
        run.directory.mkdir(parents=True)
        (run.directory / "run.png").touch()
        (run.directory / "records.jsonl").write_text(json.dumps(record(contended=disturbed)) + "\n")
    ArmsSweeper({})._spoil_unjudged(runs)
    assert [run.ended for run in runs[:2]] == [True, False]
    assert [run.spoilt for run in runs[:2]] == [False, True]


NETWORKS = {
    "a": Arm(role="dense"),
    "sooner": Arm(("epochs=2",), "sooner"),
    "narrow": Arm(("model.width=4",), "narrower"),
    "method": Arm(("prune=early", "data.progressive=0.5")),
    "adam": Arm(("optimizer=adamw", "optimizer.lr=0.01")),
    "faster": Arm(("optimizer.lr=0.2",)),
    "again": Arm(role="from_scratch", of="method"),
}


def choosing(seeds: tuple[int, ...] = (1, 2, 3)) -> Experiment:
    return replace(experiment(NETWORKS, seeds), overrides=("data=digits", "precision=auto"))


def choices(directory: Path) -> dict[str, str]:
    """What stands for `auto` in each run."""
    paths = directory.glob("*/*/environment.json")
    return {f"{path.parts[-3]}/{path.parts[-2]}": json.loads(path.read_text())["precision"] for path in paths}


@pytest.mark.parametrize("at_once", [False, True], ids=["one at a time", "a seed at once"])
def test_the_first_run_of_a_network_chooses_for_all_of_it(at_once: bool, tmp_path: Path) -> None:
    """Where each would choose something else: the dense network is compared with itself in one format, in all seeds."""
    jobs, failures, _ = swept(tmp_path, {}, at_once, declared=choosing())
    assert failures == {}
    found = choices(tmp_path)
    assert len(found) == 21
    of_arms = {arm: {found[f"{seed}/{arm}"] for seed in (1, 2, 3)} for arm in NETWORKS}
    assert all(len(of_arm) == 1 for of_arm in of_arms.values())
    assert of_arms["a"] == of_arms["sooner"] == of_arms["method"] == of_arms["faster"]
    choosing_arms = {next(iter(of_arm)) for of_arm in of_arms.values()}
    assert len(choosing_arms) == 4, "other networks, and other optimizers, choose for themselves"
    assert {subdir[0] for subdir, job, _ in jobs.started if "chosen" not in job} == {"1"}
    if at_once:
        assert len(jobs.launches) < 21
        assert jobs.launches[-4:] == [6, 1, 6, 1], "nobody waits once all have chosen"


def test_a_run_that_fails_does_not_choose(tmp_path: Path) -> None:
    swept(tmp_path, {arm: [UserError("diverged")] for arm in ("a", "sooner")}, declared=choosing())
    found = choices(tmp_path)
    ended = {run: choice for run, choice in found.items() if (tmp_path / run / "run.png").exists()}
    assert {"1/method", "2/a", "3/sooner"} <= ended.keys()
    assert len({choice for run, choice in ended.items() if run.endswith(("/a", "/sooner", "/method"))}) == 1


def test_a_damaged_choice_is_named_and_becomes_no_part_of_a_command(tmp_path: Path) -> None:
    swept(tmp_path, {}, declared=choosing(seeds=(1,)))
    for path in tmp_path.glob("1/*/environment.json"):
        path.write_text(json.dumps({"precision": "o0},objective:[params"}))
    with pytest.raises(UserError, match=r"environment\.json: damaged, precision is the name of no option"):
        swept(tmp_path, {}, declared=choosing(seeds=(1, 2)))


def test_two_commands_do_not_run_one_experiment_at_once(own: Path, command: Command) -> None:
    from morphtrain.files import named_lock

    directory = own / "experiments" / "quick-small"
    directory.mkdir(parents=True)
    with named_lock(directory / ".experiment.lock", "process 7 on earth"):
        result = command(*TYPED)
    assert result.returncode == 1
    assert "quick-small: process 7 on earth is running this experiment" in result.stderr
    assert not (directory / "experiment.yaml").exists()


def test_what_is_typed_is_of_all_arms_but_for_where_runs_go() -> None:
    aside = ("+experiment=e", "size=small", "tracking=none", "+launcher=joblib")
    given = declaration.typed([*aside, "epochs=3", "seed=4,5"])
    assert given.overrides == ("epochs=3",)
    assert given.aside == aside
    assert given.seeds == (4, 5)
    assert declaration.merged(["epochs=3", "prune=none"], ["+epochs=4"]) == ["+epochs=4", "prune=none"]


def test_runs_that_wait_start_when_what_they_wait_for_has_ended(tmp_path: Path) -> None:
    runs = planned(experiment(ARMS, (1,)), tmp_path)
    assert sorted(run.arm for run in ready(runs)) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("name", ["it's", "two words", "a=b,{c}"])
def test_the_directory_of_an_experiment_may_have_any_name(name: str) -> None:
    override = OverridesParser.create().parse_override(f"hydra.sweep.dir={_quoted(Path(name, 'small'))}")
    assert str(override.value()) == f"{name}/small"
