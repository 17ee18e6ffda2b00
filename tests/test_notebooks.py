"""The notebooks run from top to bottom, begin with a picture, and show what their text says."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
DATA = NOTEBOOKS / "data"
THEMES = ("memory", "pruning", "growth", "formats", "sweeps", "own_network")
SECONDS = "calibrated_train_seconds"


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]


def executed(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The namespace that the notebook's code cells leave, run one after the other in its directory."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(NOTEBOOKS)
    from matplotlib import pyplot

    namespace: dict[str, Any] = {}
    try:
        for number, cell in enumerate(c for c in cells(name) if c["cell_type"] == "code"):
            exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), namespace)
            drawn = [axes.has_data() for n in pyplot.get_fignums() for axes in pyplot.figure(n).axes]
            assert number > 0 or (drawn and all(drawn)), "the first code cell draws the picture"
    finally:
        pyplot.close("all")
    return namespace


def last_records(theme: str, arm: str) -> dict[int, dict[str, float]]:
    """The last record of each run of an experiment's arm, by seed."""
    paths = (DATA / theme).glob(f"*/{arm}/records.jsonl")
    return {int(path.parts[-3]): json.loads(path.read_text().splitlines()[-1]) for path in paths}


def last_by_option(theme: str, group: str) -> dict[str, dict[int, dict[str, float]]]:
    """The last record of each run of a multirun, by the option of a group and the seed."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for path in (DATA / theme).glob("*/records.jsonl"):
        overrides = (path.parent / ".hydra" / "overrides.yaml").read_text()
        typed = dict(line[2:].split("=", 1) for line in overrides.splitlines())
        found.setdefault(typed[group], {})[int(typed["seed"])] = json.loads(path.read_text().splitlines()[-1])
    return found


def log_ratio_interval(ours: list[float], theirs: list[float]) -> list[float]:
    """Geometric mean of the ratios and its t interval, by scipy."""
    logs = np.log(ours) - np.log(theirs)
    ends = stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs))
    return [float(np.exp(value)) for value in (logs.mean(), *ends)]


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(THEMES)


@pytest.mark.parametrize("name", THEMES)
def test_no_outputs_are_stored(name: str) -> None:
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}


@pytest.mark.parametrize("name", THEMES)
def test_a_notebook_asks_before_it_answers(name: str) -> None:
    first, second, *_ = cells(name)
    assert (first["cell_type"], second["cell_type"]) == ("markdown", "code")
    assert first["source"][0].startswith("# ")
    assert first["source"][0].rstrip().endswith("?")


def test_stored_records_tell_neither_host_nor_path_and_are_small() -> None:
    runs = list(DATA.rglob("records.jsonl"))
    assert len(runs) > 50
    for run in (path.parent for path in runs):
        assert "host" not in json.loads((run / "environment.json").read_text())
        for path in run.rglob("*"):
            assert path.is_dir() or path.suffix in (".json", ".jsonl", ".yaml"), path
            assert path.is_dir() or not any(f"{mark}/" in path.read_text() for mark in (": ", "=", '"')), path
    for theme in DATA.iterdir():
        assert sum(path.stat().st_size for path in theme.rglob("*") if path.is_file()) < 300_000, theme


def test_what_is_kept_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, finished in (("0", True), ("1", False)):
        run = tmp_path / "runs" / name
        (run / ".hydra").mkdir(parents=True)
        (run / "records.jsonl").write_text('{"epoch": 1, "train_seconds": 1.23456789}\n')
        (run / ".hydra" / "config.yaml").write_text(f"seed: {name}\narchitecture: {tmp_path}/runs/9/last.pt\n")
        (run / ".hydra" / "overrides.yaml").write_text(f"- seed={name}\n")
        (run / "environment.json").write_text('{"host": "mine", "processor": "P", "before": [{"host": "yours"}]}')
        (run / "last.pt").touch()
        if finished:
            (run / "run.png").touch()
    (tmp_path / "kept" / "older").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["keep.py", "runs", "kept"])
    runpy.run_path(str(NOTEBOOKS / "keep.py"), run_name="__main__")
    kept = {
        str(path.relative_to(tmp_path / "kept")): path for path in (tmp_path / "kept").rglob("*.*") if path.is_file()
    }
    assert set(kept) == {"0/records.jsonl", "0/.hydra/config.yaml", "0/.hydra/overrides.yaml", "0/environment.json"}
    assert json.loads(kept["0/records.jsonl"].read_text()) == {"epoch": 1, "train_seconds": 1.23457}
    assert kept["0/.hydra/config.yaml"].read_text() == "seed: 0\narchitecture: runs/9/last.pt\n"
    assert json.loads(kept["0/environment.json"].read_text()) == {"processor": "P"}
    assert not (tmp_path / "kept" / "older").exists()


def test_one_constant_predicts_the_thesis_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 43 rows, from the shapes of the networks alone; with downsampling no constant would do."""
    shown = executed("memory", monkeypatch)
    error = shown["error"]
    assert len(error) == 43
    assert error.median() <= 0.04
    assert error.max() <= 0.10
    assert shown["implied"].max() / shown["implied"].min() < 1.15
    halved = shown["implied_halved"]
    assert halved.max() / halved.min() > 8
    for stages, blocks, batch in ((2, 3, 2368), (4, 5, 288)):
        simulated = shown["simulated"](stages, blocks).peak(batch)
        assert shown["size"](stages, blocks, batch) == pytest.approx(simulated, abs=10), "each block adds the same"
    for line in shown["inverse"].values():
        assert line.r_squared > 0.999
        assert line.slope.p < 1e-12

    assert shown["declared"].name == "batch_time"
    points = []
    for arm in shown["declared"].arms:
        size = float(arm.removeprefix("batch_"))
        points += [(1 / size, record["median_epoch_seconds"]) for record in last_records("batch", arm).values()]
    slope, intercept = np.polyfit(*zip(*points, strict=True), 1)
    assert len(points) == shown["line"].points == 15
    assert shown["line"].slope.value == pytest.approx(slope)
    assert shown["line"].intercept.value == pytest.approx(intercept)


def test_pruned_and_dense_runs_are_compared_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = executed("pruning", monkeypatch)
    by_option = last_by_option("pruning", "prune")
    dense, pruned = by_option["none"], by_option["prunetrain"]
    assert dense.keys() == pruned.keys()
    assert len(dense) == 6

    def interval(metric: str) -> list[float]:
        return log_ratio_interval([pruned[seed][metric] for seed in dense], [dense[seed][metric] for seed in dense])

    time = shown["time"]
    assert [time.effect, time.low, time.high] == pytest.approx(interval(SECONDS))
    assert shown["shares"].loc["MACs at the end"].tolist() == pytest.approx(interval("macs"))


def test_growing_is_read_against_each_seeds_dense_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The curve computed independently: the arms whose mean accuracy rises with time, joined in log seconds."""
    shown = executed("growth", monkeypatch)
    assert shown["declared"].name == "net2net_wider"
    roles = ("dense", "sooner", "narrower")
    dense = {a: last_records("growth", a) for a, about in shown["declared"].arms.items() if about.role in roles}
    assert len(dense) == 5
    means = sorted(
        (
            np.mean([run[SECONDS] for run in runs.values()]),
            np.mean([run["test_accuracy"] for run in runs.values()]),
            arm,
        )
        for arm, runs in dense.items()
    )
    rising = [arm for n, (_, y, arm) in enumerate(means) if all(y > before for _, before, _ in means[:n])]
    ahead = []
    for seed, record in last_records("growth", "wider").items():
        points = sorted((math.log(dense[arm][seed][SECONDS]), dense[arm][seed]["test_accuracy"]) for arm in rising)
        assert math.log(record[SECONDS]) >= points[0][0]
        ahead.append(record["test_accuracy"] - np.interp(math.log(record[SECONDS]), *zip(*points, strict=True)))
    assert len(ahead) == 3
    assert shown["verdict"].ahead.mean == pytest.approx(np.mean(ahead), abs=1e-12)
    margin, test = shown["declared"].margin, stats.t.interval(0.95, 2, np.mean(ahead), stats.sem(ahead))
    expected = "pays" if test[0] > 0 else "does not pay" if test[1] < margin else "cannot tell yet"
    assert shown["verdict"].verdict == expected


def test_formats_are_compared_within_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """F of randomised blocks from the sums of squares of the textbook."""
    shown = executed("formats", monkeypatch)
    assert shown["declared"].name == "amp_levels"
    metric = shown["declared"].response
    arms = {arm: last_records("formats", arm) for arm in ("o0", "o1", "bf16")}
    seeds = sorted(arms["o0"])
    logs = np.log([[arms[arm][seed][metric] for seed in seeds] for arm in arms])  # (arms, seeds)
    between = len(seeds) * ((logs.mean(1) - logs.mean()) ** 2).sum()
    residuals = logs - logs.mean(1, keepdims=True) - logs.mean(0, keepdims=True) + logs.mean()
    f = (between / 2) / ((residuals**2).sum() / (2 * (len(seeds) - 1)))
    assert shown["variance"].f == pytest.approx(f)
    row = shown["found"].tables[0].frame.loc["o1"]
    expected = log_ratio_interval(*([arms[arm][seed][metric] for seed in seeds] for arm in ("o1", "o0")))
    assert [row["ratio"], row["ratio low"], row["ratio high"]] == pytest.approx(expected)


def test_the_fastest_trial_that_is_accurate_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = executed("sweeps", monkeypatch)
    trials = {
        int(path.parent.name): json.loads(path.read_text().splitlines()[-1])
        for path in (DATA / "sweeps").glob("*/records.jsonl")
    }
    floor = trials[0]["val_accuracy"] - 0.01
    enough = {n: trial[SECONDS] for n, trial in trials.items() if n > 0 and trial["val_accuracy"] >= floor}
    assert shown["enough"].index.tolist() == sorted(enough)
    assert shown["best"].index.tolist() == sorted(enough, key=lambda n: enough[n])[:1]
    rng = np.random.default_rng(0)
    furthest = -rng.standard_normal((100_000, max(len(enough), 1))).min(1).mean()
    assert shown["furthest"] == pytest.approx(furthest, abs=0.02)


def test_a_network_of_ones_own_keeps_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters recounted by hand from the widths that are left."""
    shown = executed("own_network", monkeypatch)
    (_, first, _), (_, pruned, _), (_, wider, _), (_, deeper, _) = shown["stages"]
    assert shown["table"]["largest difference"].dropna().max() < 1e-4
    assert shown["table"]["accuracy"].nunique() == 1
    assert shown["table"]["accuracy"].iloc[0] > 0.8

    def params(stem: int, branch: int) -> int:
        return 10 * stem + 2 * stem + (9 * stem + 1) * branch + 2 * branch + 10 * (stem + branch) + 10

    stem, branch = (module.num_features for module in (shown["net"].stem[1], shown["net"].branch[1]))
    assert first == params(16, 16)
    assert pruned == params(stem // 2, branch // 2) < first
    assert wider == params(stem, branch)
    assert deeper == wider + 9 * stem * stem + 2 * stem
    assert shown["torch"].equal(shown["outputs"](shown["loaded"]), shown["outputs"](shown["net"]))
