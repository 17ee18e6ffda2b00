"""Trials that would train what another has trained: what counts as the same, and what they get instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import KILLED_RUN, SMALL
from fork_server import ForkServer
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from test_config import composed

from morphtrain.errors import UserError
from morphtrain.sweep import report
from morphtrain.sweep.attributes import (
    BASELINE_ATTR,
    CONTENDED_ATTR,
    METRICS_ATTR,
    RUN_DIR_ATTR,
    SAME_RUN_ATTR,
    SIGNATURE_ATTR,
    STOPPED_ATTR,
    Attributes,
)
from morphtrain.sweep.comparison import compared, completed
from morphtrain.sweep.display import Display
from morphtrain.sweep.floor import Floor
from morphtrain.sweep.jobs import Jobs
from morphtrain.sweep.overtaken import Overtaken
from morphtrain.sweep.signature import same_run, signature
from morphtrain.sweep.storage import open_storage
from morphtrain.sweep.study import Plan, SharedStudy
from morphtrain.sweep.target import Target
from morphtrain.sweep.workers import Worker

ALIKE = {
    "where it is recorded": ["tracking=none"],
    "which trial it is": ["trial=3"],
    "how it goes on": ["resume=auto", "process_timeout=5"],
    "what is said twice": ["epochs=60", "optimizer.lr=1e-1"],
    "in another order": ["seed=1", "model.width=16"],
    "by another key": ["model.width=${batch_policy.batch_size}", "batch_policy.batch_size=16"],
}
DIFFERENT = {
    "seed": ["seed=2"],
    "width": ["model.width=8"],
    "option": ["optimizer=adamw"],
    "rate": ["optimizer.lr=0.1000001"],
    "threads": ["timing.cores=2"],
    "processes": ["processes=2"],
    "format": ["memory_format=channels_last"],
    "methods": ["methods=[{_target_: mine.First},{_target_: mine.Second}]"],
    "methods in another order": ["methods=[{_target_: mine.Second},{_target_: mine.First}]"],
}


@pytest.mark.parametrize("case", ALIKE)
def test_what_is_trained_alike_is_the_same_run(case: str) -> None:
    usual = ("optimizer.lr=0.1", "batch_policy.batch_size=16")
    assert signature(composed(*usual, *ALIKE[case])) == signature(composed(*usual, "model.width=16"))


def test_what_is_trained_differently_is_another_run() -> None:
    signatures = {case: signature(composed(*overrides)) for case, overrides in {"as it is": [], **DIFFERENT}.items()}
    assert len(set(signatures.values())) == len(signatures), signatures


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": {"b": 1, "c": None}}, {"a": {"c": None, "b": 1}}, True),
        ({"a": True}, {"a": 1}, False),
        ({"a": "1"}, {"a": 1}, False),
        ({"a": None}, {}, False),
        ({"a": [1, 2]}, {"a": [2, 1]}, False),
        ({"a": {"tracking": 1}}, {"a": {"tracking": 2}}, False),
        ({"a": float("inf")}, {"a": float("nan")}, False),
    ],
)
def test_values_are_the_same_by_what_they_mean(one: Any, other: Any, same: bool) -> None:
    assert (signature(OmegaConf.create(one)) == signature(OmegaConf.create(other))) == same


Say = Callable[[FrozenTrial], dict[str, Any]]
FACTS = {"directions": ["minimize"], "objective": ["train_seconds"]}
SPACE = {"x": FloatDistribution(0, 10)}


def well(trial: FrozenTrial) -> dict[str, Any]:
    """What happens to a job with which nothing goes wrong."""
    return {}


class Launcher:
    """Ends each job with a value of its own. What `say` gives is stored with its trial, or raised by the job."""

    def __init__(self, study: SharedStudy, say: Say) -> None:
        self.study, self.say = study, say
        self.numbers: list[int] = []

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        return [self._end(int(o.removeprefix("trial="))) for job in jobs for o in job if o.startswith("trial=")]

    def _end(self, number: int) -> JobReturn:
        self.numbers.append(number)
        stored, value = self.study.trials[number], float(len(self.numbers))
        said = {METRICS_ATTR: {"val_accuracy": 0.9, "train_seconds": value, "params": 5.0}, **self.say(stored)}
        if error := said.pop("raises", None):
            return JobReturn(status=JobStatus.FAILED, _return_value=error)
        for name, attr in said.items():
            self.study.storage.set_trial_user_attr(stored._trial_id, name, attr)
        return JobReturn(status=JobStatus.COMPLETED, _return_value=value)


def search(
    directory: Path, *values: float, at_once: int = 1, baseline: float | None = None, say: Say = well, **keys: Any
) -> tuple[SharedStudy, list[int]]:
    """A study whose trials have these values of x, queued as a user can queue them; and the numbers of what it ran."""
    total = len(values) + (baseline is not None)
    first = None if baseline is None else {"x": baseline}
    facts = {key: value for key, value in FACTS.items() if key != "directions"}
    plan = Plan("s", f"sqlite:///{directory}/optuna.db", ["minimize"], facts, total, first)
    study = SharedStudy(plan, optuna.samplers.RandomSampler(seed=0), optuna.pruners.NopPruner())
    for value in values if len(study.trials) < total else ():
        study.study.enqueue_trial({"x": value})
    launcher = Launcher(study, say)
    with Worker(study.storage, directory / "worker", 100) as worker:
        jobs = Jobs(
            study=study,
            worker=worker,
            launcher=launcher,  # type: ignore[arg-type]
            repeating=lambda trial: [f"x={trial.params['x']}", *keys.get("more", ())],
            composed=lambda overrides: OmegaConf.from_dotlist(list(overrides)),
            child=[],
            sweep_dir=directory,
            target=Target(["train_seconds"], None, None),
            floor=keys.get("floor"),
            max_failure_rate=keys.get("max_failure_rate", 1.0),
            repeat=keys.get("repeat", False),
            display=Display(study.study, ["train_seconds"], total, at_once),
        )
        for _ in range(3 * total):  # it must not go on for ever
            if trials := study.take(worker, at_once, lambda trial: trial.suggest_float("x", 0, 10)):
                jobs.run(trials)
    assert all(trial.state.is_finished() for trial in study.trials)
    return study, launcher.numbers


def taken(study: SharedStudy) -> dict[int, int | None]:
    """By the number of each trial, that of the one whose values it took."""
    return {trial.number: Attributes(trial).same_run_as for trial in study.trials}


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_every_run_is_trained_once(at_once: int, tmp_path: Path) -> None:
    """However many run side by side, and whether the first has ended or is among them."""
    study, ran = search(tmp_path, 1, 2, 1, 1, 3, 2, 4, at_once=at_once, floor=Floor(0.5))
    assert ran == [0, 1, 4, 6]
    assert taken(study) == {0: None, 1: None, 2: 0, 3: 0, 4: None, 5: 1, 6: None}
    for one in study.trials:
        if (other := Attributes(one).same_run_as) is not None:
            two = study.trials[other]
            assert one.state == TrialState.COMPLETE
            assert one.values == two.values
            assert one.constraints == two.constraints == {"val_accuracy": pytest.approx(-0.4)}
            assert one.user_attrs[METRICS_ATTR] == two.user_attrs[METRICS_ATTR]
            assert RUN_DIR_ATTR not in one.user_attrs, "nothing was run"


def test_repeats_are_trained_if_they_are_asked_for(tmp_path: Path) -> None:
    study, ran = search(tmp_path, 1, 1, 2, 1, repeat=True)
    assert ran == [0, 1, 2, 3]
    assert len({trial.values[0] for trial in study.trials}) == 4
    assert search(tmp_path, 1, 1, 2, 1)[1] == [], "it had its total"


def test_a_value_that_goes_by_the_number_of_the_trial_makes_another_run(tmp_path: Path) -> None:
    assert search(tmp_path, 1, 1, more=["seed=${trial}"])[1] == [0, 1]


UNFIT: dict[str, Say] = {
    "disturbed": lambda trial: {CONTENDED_ATTR: [2]},
    "stopped": lambda trial: {STOPPED_ATTR: 1},
    "failed": lambda trial: {"raises": RuntimeError("no memory")},
}


@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize("kind", UNFIT)
def test_what_was_not_measured_to_its_end_is_trained_again(kind: str, at_once: int, tmp_path: Path) -> None:
    """The first two attempts are unfit; the third has values for the fourth."""
    study, ran = search(
        tmp_path, 1, 1, 1, 1, at_once=at_once, say=lambda trial: UNFIT[kind](trial) if trial.number < 2 else {}
    )
    assert ran == [0, 1, 2]
    assert taken(study) == {0: None, 1: None, 2: None, 3: 2}


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_baseline_is_always_trained_and_others_take_its_values(at_once: int, tmp_path: Path) -> None:
    study, ran = search(tmp_path, 5, 1, baseline=5, at_once=at_once)
    assert ran == [0, 2]
    assert taken(study) == {0: None, 1: 0, 2: None}
    assert Attributes(study.trials[0]).is_baseline


def begun(directory: Path, **attrs: Any) -> optuna.Study:
    """A study whose only trial waits again, as a killed worker has left it."""
    study = optuna.create_study(study_name="s", storage=open_storage(f"sqlite:///{directory}/optuna.db"))
    study.set_user_attr("facts", FACTS)
    study.enqueue_trial({"x": 1.0}, user_attrs=attrs)
    trial = study.ask(SPACE)
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    return study


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_trial_that_has_begun_to_train_goes_on(has_checkpoint: bool, tmp_path: Path) -> None:
    """Meanwhile another worker has trained the same."""
    study = begun(tmp_path, **{RUN_DIR_ATTR: str(tmp_path / "0")})
    attrs = {SIGNATURE_ATTR: signature(OmegaConf.create({"x": 1.0})), METRICS_ATTR: {"val_accuracy": 0.9}}
    study.add_trial(optuna.trial.create_trial(value=7.0, user_attrs=attrs))
    (tmp_path / "0").mkdir()
    if has_checkpoint:
        (tmp_path / "0" / "last.pt").touch()
    shared, ran = search(tmp_path, 1)
    assert (ran, taken(shared)[0]) == (([0], None) if has_checkpoint else ([], 1))


def test_a_worker_killed_before_it_had_ended_such_a_trial_leaves_no_trace(tmp_path: Path) -> None:
    """It had said whose values the trial takes. By now repeats are wanted."""
    begun(tmp_path, **{SAME_RUN_ATTR: 5})
    shared, ran = search(tmp_path, 1, repeat=True)
    assert (ran, taken(shared)) == ([0], {0: None})


def test_they_hide_no_failures(tmp_path: Path) -> None:
    """Three of four runs fail, of seven trials."""

    def fails(trial: FrozenTrial) -> dict[str, Any]:
        return {"raises": RuntimeError("no memory")} if trial.params["x"] > 1 else {}

    with pytest.raises(UserError, match="3 of 4 trials failed"):
        search(tmp_path, 1, 1, 1, 1, 2, 3, 4, say=fails, max_failure_rate=0.6)


def finished(value: float, number: int, **attrs: Any) -> FrozenTrial:
    attrs = {METRICS_ATTR: {"val_accuracy": 0.9, "train_seconds": value}, **attrs}
    trial = optuna.trial.create_trial(value=value, user_attrs=attrs)
    trial.number = number
    return trial


@pytest.mark.parametrize("foreign", [3, None, ["a"], {"a": 1}, "another"])
def test_strange_signatures_are_nobodys(foreign: Any) -> None:
    assert same_run([finished(1.0, 0, **{SIGNATURE_ATTR: foreign})], "a") is None
    assert same_run([finished(1.0, 0, **{SIGNATURE_ATTR: "a"})], "a") is not None
    assert same_run([finished(1.0, 0, **{SIGNATURE_ATTR: "a", METRICS_ATTR: foreign})], "a") is None


def test_they_count_for_nothing_in_the_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither among the best, nor for the importances, nor for the seconds of a trial."""
    study = optuna.create_study(study_name="s")
    attrs: list[dict[str, Any]] = [{BASELINE_ATTR: True}, {}, {SAME_RUN_ATTR: 1}, {SAME_RUN_ATTR: 1}, {}]
    for number, (value, more) in enumerate(zip([9.0, 3.0, 3.0, 3.0, 5.0], attrs, strict=True)):
        study.add_trial(finished(value, number, **more))
    comparison = compared(study, ["train_seconds"])
    assert [trial.number for trial in completed(comparison.study)] == [0, 1, 4]
    assert [trial.number for trial in report.best_searched(comparison, 3)] == [1, 4]
    assert comparison.same_runs == 2
    monkeypatch.setattr(report.charts, "draw", lambda *_: [])
    monkeypatch.setattr(report, "_results", lambda *_: Path("results"))
    report.close(study, ["train_seconds"], Path(), lambda trial: ["x=1"])
    said = capsys.readouterr().out
    assert "study s: 5 COMPLETE" in said
    assert "2 trials would have trained the same as another and took its values" in said
    assert report.summary(study, ["train_seconds"])["trials_same_run"] == 2


def test_a_pruner_counts_each_run_once() -> None:
    study = optuna.create_study(pruner=Overtaken(best=2))
    for number, attrs in enumerate([{}, {SAME_RUN_ATTR: 0}, {SAME_RUN_ATTR: 0}, {}]):
        study.add_trial(finished(9.0 if number == 3 else 1.0, number, **attrs))
    trial = study.ask()
    trial.report(5.0, 1)
    assert not trial.should_prune(), "there is one better run"
    trial.report(10.0, 2)
    assert trial.should_prune()


def test_a_search_of_few_values_trains_each_once(fork_server: ForkServer, tmp_path: Path) -> None:
    """The real command: directories are made for what runs, and the closing table says so."""
    dense = [o for o in SMALL if not o.startswith(("prune", "epochs", "model.width"))]
    sweep = ["-m", "hydra/sweeper=morphtrain", *dense, "epochs=1", "model.width=4,6", "tracking=none"]
    sweep += ["hydra.sweeper.n_trials=6", "hydra/sweeper/sampler=random", "hydra.sweeper.baseline=null"]
    sweep += ["hydra.sweep.dir=sweep", "hydra.sweeper.sampler.seed=1"]
    result = fork_server.run([KILLED_RUN, "never:0", *sweep], tmp_path, {"UNDISTURBED": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    trials = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/optuna.db").trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert len(trials) == 6
    by_width: dict[int, set[float]] = {}
    for trial in trials:
        by_width.setdefault(trial.params["model.width"], set()).add(trial.values[0])
    assert {len(values) for values in by_width.values()} == {1}
    trained = sorted(int(path.parent.name) for path in tmp_path.glob("sweep/*/last.pt"))
    assert trained == [trial.number for trial in trials if Attributes(trial).same_run_as is None]
    assert len(trained) == len(by_width)
    assert "the same run as trial 0, whose values it takes" in result.stdout
    assert f"{6 - len(trained)} trials would have trained the same as another" in result.stdout
    assert "   6/6 trial 5:" in result.stdout
    assert "best so far" in result.stdout
    assert "to watch it: " in result.stdout + result.stderr
    assert "in the browser:  " in result.stdout
