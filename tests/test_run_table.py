"""The table of runs, from directories and from MLflow, and the commands that compare its rows."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import SMALL, Command
from experiment_records import declared, write_declaration

from morphtrain.errors import UserError
from morphtrain.evidence.__main__ import main
from morphtrain.evidence.experiment import Arm
from morphtrain.evidence.records import ends, load, read_records

Stored = Callable[..., Path]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """Writes a run as it is left on disk: an epoch for each accuracy, ten seconds long."""

    def write(name: str, config: str, *accuracies: float, ended: bool = True, **metrics: float) -> Path:
        directory = tmp_path / name
        (directory / ".hydra").mkdir(parents=True)
        (directory / ".hydra" / "config.yaml").write_text(config)
        records = [
            {"epoch": n, "train_seconds": 10.0 * n, "contended": 0.0, "test_accuracy": a, **metrics}
            for n, a in enumerate(accuracies, 1)
        ]
        (directory / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if ended:
            (directory / "run.png").touch()
        return directory

    return write


def pruned(seed: int, ratio: float = 0.2) -> str:
    return f"seed: {seed}\nmodel: {{blocks: 1}}\nprune: {{name: prunetrain, lasso_ratio: {ratio}, interval: 10}}\n"


def dense(seed: int) -> str:
    return f"seed: {seed}\nmodel: {{blocks: 1}}\nprune: {{name: none}}\n"


def test_a_row_is_an_epoch_and_columns_say_where_it_belongs(stored: Stored, tmp_path: Path) -> None:
    stored("sweep/2", pruned(2), 0.5, 0.7, contended=1.0)
    stored("sweep/10", dense(1), 0.4, ended=False)
    found = load(tmp_path / "sweep", tmp_path / "sweep" / "2")
    assert found["run"].tolist() == [str(tmp_path / "sweep" / name) for name in ("2", "2", "10")], "2 before 10, once"
    assert found["epoch"].tolist() == [1, 2, 1]
    assert found["seed"].tolist() == [2, 2, 1]
    assert found["prune"].tolist() == ["prunetrain", "prunetrain", "none"]
    assert found["prune.lasso_ratio"].tolist()[:2] == [0.2, 0.2] and pd.isna(found["prune.lasso_ratio"][2])
    assert "model.blocks" not in found, "it is the same in all"
    assert found["arm"].tolist() == ["prune=prunetrain", "prune=prunetrain", "prune=none"]
    assert found["finished"].tolist() == [True, True, False]
    assert found["contended_epochs"].tolist() == [2, 2, 0]
    last = ends(found)
    assert last["test_accuracy"].tolist() == [0.7, 0.4] and last.index.tolist() == [0, 1]


def test_arms_that_differ_by_a_number_are_told_apart(stored: Stored, tmp_path: Path) -> None:
    for seed in (1, 2):
        stored(f"a{seed}", pruned(seed, 0.1), 0.5)
        stored(f"b{seed}", pruned(seed, 0.4), 0.5)
    arms = ends(load(tmp_path))["arm"]
    assert arms.tolist() == ["prune.lasso_ratio=0.1"] * 2 + ["prune.lasso_ratio=0.4"] * 2


def test_the_place_below_an_experiment_is_its_arm(stored: Stored, tmp_path: Path) -> None:
    for seed in (1, 2):
        for arm, config in (("dense", dense(seed)), ("pruned", pruned(seed))):
            stored(f"experiments/pays-small/{seed}/{arm}", config, 0.5)
    (tmp_path / "experiments/pays-small/experiment.yaml").touch()
    found = load(tmp_path / "experiments")
    assert found["experiment"].unique().tolist() == ["pays-small"]
    assert list(zip(found["seed"], found["arm"], strict=True)) == [
        (1, "dense"), (1, "pruned"), (2, "dense"), (2, "pruned")
    ]  # fmt: skip


def test_an_epoch_being_written_is_not_there_yet(stored: Stored) -> None:
    run = stored("run", dense(1), 0.5, 0.6)
    path = run / "records.jsonl"
    path.write_text(path.read_text()[:-20])
    assert [record["epoch"] for record in read_records(run)] == [1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"epoch": 3', "line 3: damaged, it is no JSON"),
        ("[1, 2]", "line 3: damaged, the record is a list"),
        ('{"test_accuracy": 0.5}', "line 3: damaged, the record has no epoch"),
        ('{"epoch": 3, "test_accuracy": "high"}', "test_accuracy is a str, not float"),
        ('{"epoch": 2}', "line 3: epoch 2 after epoch 2"),
        ("[" * 100000, "line 3: damaged, it is no JSON"),
        ('{"epoch": 3, "params": 1%s}' % ("0" * 400), "line 3: damaged, params is no number"),
    ],
)
def test_damaged_records_are_named(stored: Stored, line: str, message: str) -> None:
    run = stored("run", dense(1), 0.5, 0.6)
    with (run / "records.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=r"records\.jsonl") as error:
        load(run)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("config", ["seed: [", "seed: one", "- 1", "seed: 1.5", "{{{"])
def test_a_damaged_config_is_named(stored: Stored, config: str) -> None:
    with pytest.raises(UserError, match=r"config\.yaml: damaged") as error:
        load(stored("run", config, 0.5))
    assert "\n" not in str(error.value)


def test_a_value_of_a_config_is_read_and_not_looked_up(stored: Stored, tmp_path: Path) -> None:
    stored("a", "seed: 1\ndevice: ${oc.env:HOME}\n", 0.5)
    stored("b", "seed: 1\ndevice: cpu\n", 0.5)
    assert load(tmp_path)["device"].tolist() == ["${oc.env:HOME}", "cpu"]


def test_what_holds_no_run_is_refused(tmp_path: Path) -> None:
    for source, message in (
        (tmp_path, "holds no run"),
        (tmp_path / "nothing", "no such directory"),
        (f"sqlite:///{tmp_path}/mlflow.db", "no such database"),
    ):
        with pytest.raises(UserError, match=message):
            load(source)
    assert not list(tmp_path.iterdir()), "nothing is made by looking"
    with pytest.raises(UserError, match="no runs"):
        load()


def test_mlflow_has_the_same_table(command: Command, tmp_path: Path) -> None:
    overrides = (*SMALL, "epochs=2", "prune=none,prunetrain", "hydra.sweep.dir=grid")
    overrides = tuple(o for o in overrides if o != "prune=prunetrain" and not o.startswith("prune."))
    result = command("-m", *overrides)
    assert result.returncode == 0, result.stderr
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (study,) = {path.parent.name for path in (tmp_path / "grid").glob("*")}
    here, there = load(tmp_path / "grid"), load(uri)
    places = ["run", "arm"]
    assert set(there.columns) == set(here.columns)
    pd.testing.assert_frame_equal(
        here.drop(columns=places), there[here.columns].drop(columns=places), check_dtype=False, atol=1e-3, rtol=0
    )
    assert there["arm"].tolist() == here["arm"].tolist()
    assert len(load(uri, study=study)) == len(here)
    with pytest.raises(UserError, match="has no run of study 'other' with an epoch"):
        load(uri, study="other")
    with pytest.raises(UserError, match="has no experiment 'other'; it has Default, morphtrain"):
        load(uri, mlflow_experiment="other")


@pytest.fixture
def grid(stored: Stored, tmp_path: Path) -> str:
    for seed in range(1, 8):
        stored(f"dense{seed}", dense(seed), 0.5, 0.9 + seed / 1000, params=100 + seed)
        stored(f"pruned{seed}", pruned(seed), 0.5, 0.905 + seed / 900, params=70 + seed)
    stored("unfinished", dense(9), 0.1, ended=False, params=9)
    return str(tmp_path)


def test_the_commands_say_effect_interval_and_n(grid: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["test", grid, "--by", "prune", "--paired", "seed", "--margin", "0.01"]) == 0
    note, test, no_worse, equivalent = capsys.readouterr().out.splitlines()
    assert note == "note: 1 of 15 runs left out, which did not come to their end"
    assert test.startswith("prunetrain - none: 0.005444 [") and "(7 pairs), paired t test p = " in test
    assert no_worse.startswith("prunetrain - none: is no worse (not below -0.01): 0.005444 [")
    assert equivalent.startswith("prunetrain - none: is equivalent within -0.01 to 0.01: 0.005444 [")
    assert main(["test", grid, "--by", "prune", "--metric", "params"]) == 0
    assert "prunetrain / none: 0.711" in capsys.readouterr().out
    assert main(["test", grid, "--by", "seed", "--metric", "params"]) == 1
    assert "a group of 2 runs: must be 3 or more in each" in capsys.readouterr().err
    assert main(["fit", grid, "--x", "params", "--y", "test_accuracy"]) == 0
    assert "test_accuracy against params (14 points, R^2 = " in capsys.readouterr().out
    assert main(["table", grid, "--csv", str(tmp_path / "runs.csv")]) == 0
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 15
    assert main(["table", grid]) == 0
    assert "prune=prunetrain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "prun"], "prun: no metric, and no config key in which these runs differ; did you mean prune"),
        (["--by", "prune", "--metric", "speed"], "speed: no metric"),
        (["--by", "prune", "--metric", "arm"], "arm: its values are no numbers, such as prune=none"),
        (["--by", "prune", "--paired", "finished"], "has two runs with finished=True"),
        (["--by", "prune", "--paired", "params"], "no value of it is in every group"),
        (["--by", "finished"], "all runs have the same, True"),
        (["--by", "prune", "--margin", "-1"], "--margin -1: must be above 0"),
        (["--by", "prune", "--metric", "test_acuracy"], "did you mean test_accuracy"),
    ],
)
def test_a_mistake_is_one_line(
    grid: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", grid, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_first_group_is_the_arm_declared_first(
    stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {"plain": Arm(role="dense"), "fast": Arm(), "also": Arm()}
    directory = write_declaration(tmp_path, declared("ratio", arms, range(1, 5)))
    for seed in range(1, 5):
        for n, arm in enumerate(arms):
            stored(f"{directory.name}/{seed}/{arm}", f"seed: {seed}\nlr: {n}\n", 0.5 + seed / 100 + n * seed / 300)
    assert main(["test", str(directory), "--by", "arm", "--paired", "seed", "--margin", "0.5"]) == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert first == "every pair of 3 groups is compared; the first is plain"
    pairs = ["fast - plain", "also - plain", "also - fast"]
    assert [line.split(":")[0].strip() for line in lines] == [*pairs, *pairs[:1] * 2, *pairs[1:2] * 2]


def test_identical_values_are_equivalent(stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(1, 5):
        stored(f"a{seed}", pruned(seed, 0.1), 0.5)
        stored(f"b{seed}", pruned(seed, 0.4), 0.5)
    for paired in ([], ["--paired", "seed"]):
        assert main(["test", str(tmp_path), "--by", "prune.lasso_ratio", "--margin", "0.01", *paired]) == 0
        assert "0.4 - 0.1: all alike, difference 0: no worse, and equivalent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("references", "metric", "said"),
    [
        ((1.0, 2.0), "train_seconds", "so train_seconds may not compare; calibrated times do"),
        ((1.0, 2.0), "calibrated_train_seconds", ""),
        ((1.0, 1.0), "calibrated_train_seconds", "so calibrated_train_seconds may not compare; in some calibrated"),
        ((1.0, 1.0), "test_accuracy", ""),
    ],
)
def test_disturbed_times_are_said_not_to_compare(
    references: tuple[float, float],
    metric: str,
    said: str,
    stored: Stored,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed in range(1, 5):
        stored(f"dense{seed}", dense(seed), 0.5, calibrated_train_seconds=5.0 + seed, reference_seconds=1.0)
        run = stored(f"pruned{seed}", pruned(seed), 0.6 + seed / 100, calibrated_train_seconds=4.0 + seed)
        record = json.loads((run / "records.jsonl").read_text())
        record |= {"contended": 1.0, "test_accuracy": 0.6 + seed / 100}
        lines = [json.dumps({**record, "epoch": n, "reference_seconds": r}) for n, r in enumerate(references, 1)]
        (run / "records.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["test", str(tmp_path), "--by", "prune", "--metric", metric, "--paired", "seed"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert len(notes) == bool(said)
    assert not said or said in notes[0]


def test_runs_of_a_group_in_different_formats_are_said_to_be(
    stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(1, 5):
        stored(f"dense{seed}", dense(seed), 0.5 + seed / 100, precision_bits=32.0 if seed == 2 else 16.0)
        stored(f"pruned{seed}", pruned(seed), 0.6 + seed / 100)
    assert main(["test", str(tmp_path), "--by", "prune", "--paired", "seed"]) == 0
    said = "note: auto chose differently in the runs of one group, none: 3 runs in 16 bits and 1 run in 32 bits\n"
    shown = capsys.readouterr().out
    assert (shown.count("note:"), shown.count(said)) == (1, 1)


def test_runs_of_a_group_in_different_numbers_of_processes_are_said_to_be(
    stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(1, 5):
        several = {"processes": 2.0} if seed == 2 else {}
        stored(f"dense{seed}", dense(seed), 0.5 + seed / 100, **several)
        stored(f"pruned{seed}", pruned(seed), 0.6 + seed / 100)
    assert main(["test", str(tmp_path), "--by", "prune", "--paired", "seed"]) == 0
    counts = "none: 3 runs in one process and 1 run in 2 processes"
    assert f"note: the runs of one group had different numbers of processes, {counts}\n" in capsys.readouterr().out


def test_help_imports_nothing_slow() -> None:
    script = "import sys, morphtrain.evidence.__main__ as m\ntry: m.main(['test', '--help'])\nexcept SystemExit: pass\n"
    script += "print(sorted({'torch', 'pandas', 'numpy', 'scipy', 'statsmodels', 'mlflow'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "--margin" in shown and shown.endswith("[]\n")


@pytest.mark.parametrize("paired", [[], ["--paired", "seed"]], ids=["groups", "pairs"])
@pytest.mark.parametrize(
    ("steps", "by_seed", "said"),
    [
        (0.0, 0.0, "3 groups: all values are equal: there is nothing to test"),
        (0.1, 0.0, "so the differences between "),
        (0.0, 0.1, {"groups": "p = 1", "pairs": "3 groups: all groups are equal in every block"}),
        (0.1, 0.1, {"groups": "p = ", "pairs": "3 groups: the groups are equally far apart in every block"}),
    ],
)
def test_many_groups_in_which_nothing_scatters_are_answered_in_words(
    steps: float,
    by_seed: float,
    said: str | dict[str, str],
    paired: list[str],
    stored: Stored,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed in range(1, 5):
        for n, ratio in enumerate((0.1, 0.4, 0.7)):
            stored(f"{ratio}-{seed}", pruned(seed, ratio), 0.3 + n * steps + seed * by_seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["test", str(tmp_path), "--by", "prune.lasso_ratio", *paired]) == 0
    out = capsys.readouterr().out
    assert (said if isinstance(said, str) else said["pairs" if paired else "groups"]) in out
    assert "nan" not in out and "inf" not in out
    assert ("0.4 - 0.1: " in out) == (steps > 0 or (by_seed > 0 and not paired)), "pairs that differ, or are tested"
