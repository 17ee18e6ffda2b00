"""The report says what the records say, of all of them, and as a page that anybody can read."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from experiment_records import MACHINE, cut, declared, write
from omegaconf import OmegaConf
from scipy import stats

from morphtrain import schema
from morphtrain.evidence import drawing
from morphtrain.evidence.analyses import factor
from morphtrain.evidence.comparisons import DIFFERENCE
from morphtrain.evidence.experiment import Arm
from morphtrain.evidence.repeats import geometric, share
from morphtrain.report import chapter3
from morphtrain.report.__main__ import main
from morphtrain.report.build import build, read

SEEDS = range(1, 8)
EPOCHS = 4
SECONDS = {"dense": 100, "sooner": 50, "soonest": 25, "narrower": 80, "good": 50, "poor": 60, "fresh": 50}
ACCURACY = {"dense": 0.96, "sooner": 0.94, "soonest": 0.9, "narrower": 0.93, "good": 0.96, "poor": 0.90, "fresh": 0.95}
ROLES = {"dense": "dense", "sooner": "sooner", "soonest": "sooner", "narrower": "narrower", "fresh": "from_scratch"}
INTERVALS = {"every_2": 60, "every_5": 63, "every_10": 70}
BLOCKS = (1, 2, 3, 5, 8)
VOID = {"meta", "link", "br", "img", "input", "hr"}


def noise(*key: object, spread: float) -> float:
    """The same for the same key."""
    return float(np.random.default_rng([*map(ord, repr(key))]).normal(0, spread))


def metrics(arm: str, seed: int, epoch: int) -> dict[str, float]:
    """Times that share a seed's drift, and accuracies that share a seed's luck."""
    seconds = ({**SECONDS, **INTERVALS}[arm]) * np.exp(noise(seed, spread=0.1) + noise(arm, seed, spread=0.01))
    accuracy = ACCURACY.get(arm, 0.95) + noise("luck", seed, spread=0.003) + noise("luck", arm, seed, spread=0.001)
    record = {"val_accuracy": accuracy - 0.3 / epoch, "calibrated_train_seconds": seconds * epoch / EPOCHS}
    return record | ({"test_accuracy": accuracy} if epoch == EPOCHS else {})


def batches(arm: str, seed: int, _: int) -> dict[str, float]:
    blocks = int(arm.removeprefix("blocks_"))
    return {"batch_size": 1e4 / (3 + 4 * blocks) * (1 + noise(arm, seed, spread=0.01))}


ARMS = {
    name: Arm(role=ROLES.get(name, "method"), of="good" if name == "fresh" else None, overrides=(f"arm={name}",))
    for name in SECONDS
}
THREE = {name: ARMS[name] for name in ("dense", "good", "poor")}
FACTOR = {name: Arm((f"prune.interval={name.removeprefix('every_')}",)) for name in INTERVALS}
LINE = {f"blocks_{n}": Arm((f"model.blocks={n}",)) for n in BLOCKS}


@dataclass
class Page(HTMLParser):
    """The page as a browser takes it: elements that are closed in order, their names, and what they refer to."""

    text: str
    ids: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, list[str]]] = [("", [])]
        self.feed(self.text)
        self.close()
        self.wrong += [f"{tag} is not closed" for tag, _ in self.open[1:]]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open[-1][1].append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append((tag, []))

    def handle_endtag(self, tag: str) -> None:
        name, children = self.open.pop()
        if name != tag:
            self.wrong.append(f"</{tag}> closes {name}")
        first = {"table": "caption", "svg": "title"}.get(tag)
        if first and children[:1] != [first]:
            self.wrong.append(f"a {tag} without a {first}")


@dataclass(frozen=True)
class Report:
    """A report, and the experiments it is about."""

    root: Path
    html: str

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.root / "report-tables" / f"{name}.csv", index_col=0)

    def section(self, name: str) -> str:
        found = re.search(rf'<section id="q-{name}-small".*?</section>', self.html, re.DOTALL)
        assert found is not None
        return found[0]

    def answer(self, name: str) -> str:
        found = re.search(r'class="answer">(.*?)</p>', self.section(name), re.DOTALL)
        assert found is not None
        return found[1]

    def values(self, name: str, metric: str) -> dict[str, list[float]]:
        """Of the last epoch by arm, in the order of seeds: read without the product's loader."""
        arms: dict[str, list[float]] = {}
        for run in sorted((self.root / f"{name}-small").glob("*/*")):
            last = json.loads((run / "records.jsonl").read_text().splitlines()[-1])
            arms.setdefault(run.name, []).append(last[metric])
        return arms


def reported(root: Path) -> Report:
    page, *_ = build(root, root / "report.html")
    return Report(root, page.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("experiments")
    write(root, declared("pays", ARMS, SEEDS), metrics, EPOCHS)
    write(root, declared("ratio", THREE, SEEDS), metrics, EPOCHS)
    write(root, declared("no_worse", THREE, SEEDS, response="test_accuracy"), metrics, EPOCHS)
    write(root, declared("curves", THREE, SEEDS, response="test_accuracy"), metrics, EPOCHS)
    write(root, declared("factor", FACTOR, SEEDS, x="prune.interval"), metrics, EPOCHS)
    configs = {name: {"model": {"blocks": int(name.removeprefix("blocks_"))}} for name in LINE}
    line = declared("line", LINE, (1, 2), response="batch_size", inverse=True, x="model.blocks")
    write(root, line, batches, 1, configs)
    return reported(root)


def t_interval(values: Any) -> tuple[float, float, float]:
    """Mean and 95 % interval."""
    mean = float(np.mean(values))
    return (mean, *map(float, stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))))


def row(table: pd.DataFrame, arm: str, column: str) -> list[float]:
    return [float(table.loc[arm, name]) for name in (column, f"{column} low", f"{column} high")]


def test_a_method_is_held_against_the_dense_curve_of_its_own_seed(report: Report) -> None:
    seconds, accuracy = (report.values("pays_question", f"{m}") for m in ("calibrated_train_seconds", "test_accuracy"))
    table = report.table("pays_question-small-methods")
    for arm in ("good", "poor"):
        ahead = []
        for seed in range(len(SEEDS)):  # the narrower arm is worse than the faster one, so no part of the curve
            x = [np.log(seconds[name][seed]) for name in ("soonest", "sooner", "dense")]
            y = [accuracy[name][seed] for name in ("soonest", "sooner", "dense")]
            ahead.append(accuracy[arm][seed] - np.interp(np.log(seconds[arm][seed]), x, y))
        assert row(table, arm, "difference") == pytest.approx(t_interval(ahead), rel=1e-8)
        assert row(table, arm, "seconds") == pytest.approx(np.exp(t_interval(np.log(seconds[arm]))), rel=1e-8)
    assert list(table["verdict"]) == ["pays", "does not pay"]
    assert "1 of 2 methods pays" in report.answer("pays_question")
    fresh = np.subtract(accuracy["good"], accuracy["fresh"])
    found = row(report.table("pays_question-small-from-scratch"), "good", "the method is ahead by")
    assert found == pytest.approx(t_interval(fresh), rel=1e-8)


def test_the_front_page_has_every_method_with_its_verdict(report: Report) -> None:
    front = report.html.partition('id="methods"')[2].partition("</section>")[0]
    rows = re.findall(r'<tr><th scope="row"><a href="#q-pays_question-small">(\w+)</a>.*?</tr>', front)
    assert rows == ["good", "poor"]
    assert "does not pay" in front


def test_a_method_that_no_dense_run_is_as_fast_as_is_named_and_not_judged(tmp_path: Path) -> None:
    def hurried(arm: str, seed: int, epoch: int) -> dict[str, float]:
        record = metrics(arm, seed, epoch)
        share = {"good": 0.1, "poor": 5.0}.get(arm, 1.0)
        return record | {"calibrated_train_seconds": share * record["calibrated_train_seconds"]}

    write(tmp_path, declared("pays", ARMS, SEEDS), hurried, EPOCHS)
    found = reported(tmp_path)
    assert "Not judged: good, which was faster than every dense arm" in found.answer("pays_question")
    assert "slower than every dense arm: poor: 7 of 7" in found.section("pays_question")
    assert list(found.table("pays_question-small-methods").index) == ["poor"]
    accuracy = found.values("pays_question", "test_accuracy")
    wanted = t_interval(np.subtract(accuracy["poor"], accuracy["dense"]))
    assert row(found.table("pays_question-small-methods"), "poor", "difference") == pytest.approx(wanted, rel=1e-8)


def test_a_ratio_is_that_of_the_logarithms_of_pairs(report: Report) -> None:
    seconds = report.values("ratio_question", "calibrated_train_seconds")
    table = report.table("ratio_question-small-ratios")
    ps = []
    for arm in ("good", "poor"):
        logs = np.log(np.divide(seconds[arm], seconds["dense"]))
        assert row(table, arm, "ratio") == pytest.approx(np.exp(t_interval(logs)), rel=1e-8)
        ps.append(stats.ttest_1samp(logs, 0).pvalue)
    assert list(table["p"][1:]) == pytest.approx(holm(ps))
    low, high = table.loc["good", ["ratio low", "ratio high"]]
    digits = 1 - math.floor(math.log10(high - low))  # two of the interval's width
    assert f"[{low:.{digits}f}, {high:.{digits}f}] with good (n = 7 seeds)" in report.answer("ratio_question")


def holm(ps: list[float]) -> list[float]:
    """Of two p."""
    small, large = sorted(ps)
    corrected = {small: min(1, 2 * small), large: max(min(1, 2 * small), large)}
    return [corrected[p] for p in ps]


def test_no_worse_is_an_interval_that_ends_before_the_margin(report: Report, tmp_path: Path) -> None:
    accuracy = report.values("no_worse_question", "test_accuracy")
    table = report.table("no_worse_question-small-no-worse")
    for arm in ("good", "poor"):
        difference = np.subtract(accuracy[arm], accuracy["dense"])
        assert row(table, arm, "difference") == pytest.approx(t_interval(difference), rel=1e-8)
        p = stats.ttest_1samp(difference, -0.01, alternative="greater").pvalue
        assert table.loc[arm, "one-sided p"] == pytest.approx(p, rel=1e-6)
    assert list(table["verdict"][1:]) == ["no worse", "worse"]
    said = "1 of 2 arms is shown to be no worse than dense by 0.01 of test accuracy: good no worse ("
    assert report.answer("no_worse_question").startswith(said)

    def verdicts(response: str, margin: float, spread: float) -> list[str]:
        def scattered(arm: str, seed: int, epoch: int) -> dict[str, float]:
            worse = {"dense": 0.0, "good": 0.004, "poor": 0.06}[arm] + spread * noise(arm, seed, spread=1)
            return {"val_accuracy": 0.9 - worse, "val_loss": 0.3 + worse}

        shutil.rmtree(tmp_path / "no_worse_question-small", ignore_errors=True)
        experiment = declared("no_worse", THREE, SEEDS, response=response, margin=margin)
        question = read(write(tmp_path, experiment, scattered, EPOCHS), tmp_path)
        assert question.is_open == ("cannot tell yet" in question.answer)
        return list(question.section.tables[0].frame["verdict"][1:])

    for response in ("val_accuracy", "val_loss"):
        assert verdicts(response, 0.01, 0.001) == ["no worse", "worse"]
        assert verdicts(response, 0.002, 0.0) == ["worse", "worse"], "nothing scatters"
        assert verdicts(response, 0.01, 0.1) == ["cannot tell yet"] * 2


def test_differences_at_the_end_are_paired_by_seed(report: Report) -> None:
    accuracy = report.values("curves_question", "test_accuracy")
    table = report.table("curves_question-small-ends")
    for arm in ("good", "poor"):
        wanted = t_interval(np.subtract(accuracy[arm], accuracy["dense"]))
        assert row(table, arm, "difference") == pytest.approx(wanted, rel=1e-8)
    assert "n = 7 seeds" in report.answer("curves_question")


def test_the_analysis_of_variance_takes_the_seeds_as_blocks(report: Report) -> None:
    logs = np.log(np.array([report.values("factor_question", "calibrated_train_seconds")[arm] for arm in FACTOR]))
    arms, seeds = logs.shape
    arm_means, seed_means = logs.mean(1, keepdims=True), logs.mean(0, keepdims=True)
    between = seeds * ((arm_means - logs.mean()) ** 2).sum() / (arms - 1)
    within = ((logs - arm_means - seed_means + logs.mean()) ** 2).sum() / ((arms - 1) * (seeds - 1))
    assert f"F(2, 12) = {between / within:.3g}" in report.section("factor_question")
    assert "every_10 and every_2 are the farthest apart" in report.answer("factor_question")
    table = report.table("factor_question-small-pairs")
    wanted = np.exp(t_interval(logs[2] - logs[0]))
    assert row(table, "every_10 against every_2", "ratio") == pytest.approx(wanted, rel=1e-8)


def test_of_two_arms_the_lower_one_is_said_to_be_below() -> None:
    for seeds in (2, 3):  # without an interval, and with one
        high = {seed: 0.9 + 0.01 * seed for seed in range(seeds)}
        low = {seed: value - 0.08 - 0.001 * (seed % 2) for seed, value in high.items()}
        for first, second, side in ((high, low, "below"), (low, high, "above")):
            groups = {"first": first, "second": second}
            answer = factor._answer("val_accuracy", groups, factor._pairs(groups, DIFFERENCE))
            assert re.search(rf"with second is 0\.08\d* (\[0\.0[\d., ]+\] )?{side} that with first", answer), answer


def test_the_line_is_that_of_scipy(report: Report) -> None:
    points = report.values("line_question", "batch_size")
    x = [n for n in BLOCKS for _ in points[f"blocks_{n}"]]
    y = [1 / batch for n in BLOCKS for batch in points[f"blocks_{n}"]]
    wanted = stats.linregress(x, y)
    table = report.table("line_question-small-line")
    assert table.loc["slope", "estimate"] == pytest.approx(wanted.slope, rel=1e-8)
    assert table.loc["intercept", "estimate"] == pytest.approx(wanted.intercept, rel=1e-8)
    assert f"n = 10 runs, R² = {wanted.rvalue**2:.4f}" in report.answer("line_question")


def test_equal_methods_and_the_legend_hide_nothing() -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    points = {name: (geometric([4.0, 5.0, 6.0]), share([0.9, 0.91, 0.92])) for name in ("one", "two", "three")}
    drawing.against_seconds(axes, points, [(1.0, 0.8), (9.0, 0.95)], points)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    marks = [line for line in axes.lines if line.get_markersize() > 6 and line.get_marker() in ("o", "s", "^")]
    assert len({mark.get_markersize() for mark in marks}) == len(marks) == 3
    assert {mark.get_markerfacecolor() for mark in marks} == {"none"}


def test_arms_that_computed_the_same_are_no_different_methods(tmp_path: Path) -> None:
    arms = {**THREE, "twin": ARMS["good"]}

    def twins(arm: str, seed: int, epoch: int) -> dict[str, float]:
        of = "good" if arm == "twin" else arm
        times = {"calibrated_train_seconds": 50.0 + seed + len(arm), "timestamp": float(len(arm))}
        return {**metrics(of, seed, epoch), **times, "channel_density": 0.5 + (arm == "twin" and seed == 8)}

    configs = {"twin": {"prune": {"lasso_ratio": 0.4}}, "good": {"prune": {"lasso_ratio": 0.2}}}
    write(tmp_path / "a", declared("ratio", arms, SEEDS), twins, EPOCHS, configs)
    write(tmp_path / "b", declared("ratio", arms, range(1, 9)), twins, EPOCHS, configs)
    html = reported(tmp_path).html
    assert html.count("good and twin came to the same numbers") == 1, "with seed 8 they did not"


def test_seconds_are_positive_and_accuracies_at_most_one(tmp_path: Path) -> None:
    def wide(arm: str, seed: int, _: int) -> dict[str, float]:
        seconds = 10.0 ** (seed - 2) * SECONDS[arm]
        return {"calibrated_train_seconds": seconds, "test_accuracy": 0.9 if seed == 2 else 1.0}

    write(tmp_path, declared("pays", ARMS, (1, 2, 3)), wide, 1)
    table = reported(tmp_path).table("pays_question-small-dense")
    assert (table["seconds low"] > 0).all() and (table["accuracy high"] == 1).all()
    assert table.loc["dense", "seconds"] == pytest.approx(SECONDS["dense"])


def test_a_claim_shows_what_its_verdict_rests_on(report: Report, tmp_path: Path) -> None:
    def verdict_of(directory: Path, expects: Mapping[str, str] | None) -> tuple[str, str]:
        question = read(directory, directory.parent)
        claim = chapter3.Claim("", "", "", expects)
        return chapter3.measured_for(claim, question), chapter3.verdict(claim, question)

    pays = report.root / "pays_question-small"
    shown, verdict = verdict_of(pays, {"is": "lower", "metric": "calibrated_train_seconds", "arm": "good"})
    assert shown.startswith("Training time in calibrated seconds, good - dense: -") and "(n = 7 seeds)" in shown
    assert verdict == chapter3.AGREES
    assert verdict_of(report.root / "ratio_question-small", None)[1] == "open in the draft, answered here"
    directory = write(tmp_path, declared("ratio", THREE, SEEDS), metrics, EPOCHS)
    cut(directory, 7, "poor", 2)
    assert verdict_of(directory, None)[1] == chapter3.UNTOLD, "runs are missing"

    def noisy(arm: str, seed: int, epoch: int) -> dict[str, float]:
        return {**metrics(arm, seed, epoch), "test_accuracy": 0.9 + (seed * len(arm)) % 7 / 50}

    directory = write(tmp_path, declared("pays", ARMS, SEEDS), noisy, EPOCHS)
    assert "cannot tell yet" in read(directory, tmp_path).answer
    assert verdict_of(directory, None)[1] == chapter3.UNTOLD


def test_the_command_repeats_an_experiment_of_ones_own(tmp_path: Path) -> None:
    directory = write(tmp_path, declared("ratio", THREE, SEEDS), metrics, EPOCHS)
    sources = [{"path": "pkg", "provider": "main"}, {"path": "/home/me/my options", "provider": "command-line"}]
    hydra = {"hydra": {"runtime": {"config_sources": sources}}}
    for run in directory.glob("*/*"):
        (run / ".hydra" / "hydra.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(hydra)))
    command = read(directory, tmp_path).command
    assert "--config-dir '/home/me/my options' +experiment=ratio_question size=small" in command
    assert command.endswith("seed=1,2,3,4,5,6,7")


def test_the_page_is_well_formed_and_has_a_name_for_everything(report: Report) -> None:
    page = Page(report.html)
    assert page.wrong == []
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 6
    for tag, name, value in page.attributes:
        if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
            assert value == "data:," or value.removeprefix("#") in page.ids, (tag, name, value)
        if name in ("aria-labelledby", "clip-path"):
            assert all(part in page.ids for part in value.replace("url(#", "").strip(")").split()), value
    assert not {"script", "img", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in report.html and not re.search(r"url\((?!#)", report.html)
    assert page.tags.count("h1") == 1 and page.tags.count("main") == 1
    heads = [name for tag, name, _ in page.attributes if tag == "th" and name == "scope"]
    assert len(heads) == page.tags.count("th")


def test_every_answer_has_n_and_an_interval_and_every_section_a_command(report: Report) -> None:
    for name in ("pays", "ratio", "no_worse", "curves", "factor", "line"):
        assert re.search(r"n = \d+ (seed|run)s", report.answer(f"{name}_question")), name
        assert re.search(r"\[[-+0-9.e]+, [-+0-9.e]+\]", report.answer(f"{name}_question")), name
        assert f"+experiment={name}_question size=small" in report.section(f"{name}_question")


def test_the_same_records_make_the_same_page(report: Report) -> None:
    def undated(html: str) -> str:
        return re.sub(r"Built \d.*?\.", "", html)

    assert undated(reported(report.root).html) == undated(report.html)


HOSTILE = """</title><script>alert(1)</script>"><img src=http://example.org/x onerror=alert(2)> ' id="methods"""


def test_what_is_in_files_is_text_on_the_page(tmp_path: Path) -> None:
    arms = {name: Arm((f"model={HOSTILE}",)) for name in ("dense", "other")}
    more = {"question": f"{HOSTILE}?", "claim": HOSTILE, "limits": HOSTILE, "thesis": HOSTILE}
    response = f"x{HOSTILE}"
    experiment = declared("ratio", arms, SEEDS, response=response, **more)
    machine = {**MACHINE, "processor": HOSTILE}
    write(tmp_path, experiment, lambda arm, seed, _: {response: seed + len(arm)}, 2, machine=machine)
    page = Page(reported(tmp_path).html)
    assert page.wrong == []
    assert not {"script", "img"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert not any(name.startswith("on") for _, name, _ in page.attributes)


@pytest.mark.parametrize(
    ("expects", "verdict"),
    [
        ({"is": "lower", "arm": "poor"}, chapter3.AGREES),
        ({"is": "higher", "arm": "poor"}, chapter3.DISAGREES),
        ({"is": "different", "arm": "poor"}, chapter3.AGREES),
        ({"is": "higher", "arm": "good", "against": "poor", "metric": "test_accuracy"}, chapter3.AGREES),
        ({"is": "higher", "arm": "same"}, chapter3.UNTOLD),
        ({"is": "no worse", "arm": "good", "metric": "test_accuracy"}, chapter3.AGREES),
        ({"is": "no worse", "arm": "poor", "metric": "test_accuracy"}, chapter3.DISAGREES),
        ({"is": "higher", "arm": "renamed"}, "too few runs yet"),
    ],
)
def test_a_verdict_on_the_thesis_follows_from_the_interval(
    expects: Mapping[str, str], verdict: str, tmp_path: Path
) -> None:
    def seconds(arm: str, seed: int, epoch: int) -> dict[str, float]:
        return metrics("dense" if arm == "same" else arm, seed + (arm == "same"), epoch)

    experiment = declared("ratio", {**THREE, "same": ARMS["dense"]}, SEEDS)
    question = read(write(tmp_path, experiment, seconds, EPOCHS), tmp_path)
    assert chapter3.verdict(chapter3.Claim("", "", "ratio_question", expects), question) == verdict
    assert chapter3.verdict(chapter3.Claim("", "", "", expects, "gpu"), question) == "needs a GPU"
    assert chapter3.verdict(chapter3.Claim("", "", "", expects), None) == "not yet run"


def test_claims_name_experiments_and_arms_that_are_declared() -> None:
    files = {path.stem: path for path in (schema.CONF / "experiment").glob("*.yaml")}
    for claim in chapter3.read():
        if claim.experiment in files:
            arms = OmegaConf.load(files[claim.experiment]).hydra.sweeper.arms
            named = {claim.expects[key] for key in ("arm", "against") if key in (claim.expects or {})}
            assert named <= set(arms), claim


def test_help_waits_for_nothing_slow() -> None:
    code = "import sys\nfrom morphtrain.report.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'pandas', 'scipy', 'matplotlib', 'statsmodels', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("wrong", ["missing", "empty", "declaration", "records", "environment"])
def test_mistakes_are_one_line_and_leave_nothing(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write(tmp_path / "all", declared("ratio", THREE, SEEDS), metrics, EPOCHS)
    place = {"missing": tmp_path / "nowhere", "empty": directory / "1" / "good"}.get(wrong, tmp_path / "all")
    damaged = {"records": "1/good/records.jsonl", "environment": "1/good/environment.json"}
    damaged["declaration"] = "experiment.yaml"
    if wrong in damaged:
        (directory / damaged[wrong]).write_text("{nonsense\n{}\n")
    assert main([str(place), "--out", str(tmp_path / "out.html")]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert str(directory / damaged[wrong] if wrong in damaged else place) in said
    assert not list(tmp_path.glob("out*"))


def test_the_command_says_what_it_wrote(report: Report, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "mine.html"
    assert main([str(report.root), "--out", str(out)]) == 0
    tables = list((tmp_path / "new" / "mine-tables").glob("*.csv"))
    folder = tmp_path / "new" / "mine-tables"
    assert capsys.readouterr().out.splitlines() == [str(out), f"{folder}/: {len(tables)} tables"]
    assert len(pd.read_csv(tmp_path / "new" / "mine-tables" / "ends.csv")) == 7 * (7 + 3 + 3 + 3 + 3) + 10


def test_characters_that_no_page_can_show_are_replaced(tmp_path: Path) -> None:
    odd = "\x00\x0b\x1b\x85\uffff"
    text = f"a{odd}b"
    arms = {name: Arm((f"model={text}{name}",)) for name in ("one", "other", "another")}

    def odd_metrics(arm: str, seed: int, _: int) -> dict[str, float]:
        return {text: len(arm) + noise(arm, seed, spread=0.1)}

    for kind in ("factor", "ratio", "curves"):
        experiment = declared(kind, arms, range(1, 4), question=f"{text}?", claim=text, limits=text, response=text)
        write(tmp_path, experiment, odd_metrics, 2, machine={**MACHINE, "processor": f"{text}\ud800"})
    page = Page(reported(tmp_path).html)
    assert page.wrong == []
    pictures = re.findall(r"<svg.*?</svg>", page.text, re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        assert ElementTree.fromstring(picture) is not None and "a\ufffd" in picture
    tables = [path.read_text() for path in tmp_path.rglob("*.csv")]
    assert not any(character in shown for shown in (page.text, *tables) for character in odd)


@pytest.mark.parametrize(
    "place", [".", "..", "", "a directory", "a pipe", "a file/report.html", "read-only/report.html"]
)
def test_a_place_where_no_report_can_be_is_one_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "all", declared("ratio", THREE, range(1, 3)), metrics, 1)
    (tmp_path / "here" / "a directory").mkdir(parents=True)
    (tmp_path / "here" / "a file").touch()
    os.mkfifo(tmp_path / "here" / "a pipe")
    (tmp_path / "here" / "read-only").mkdir(mode=0o500)
    if place.startswith("read-only") and os.access(tmp_path / "here" / "read-only", os.W_OK):
        pytest.skip("nothing is read-only for this user")
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tmp_path / "all"), "--out", place]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert str(Path(place)).partition("/")[0] in said
    assert sorted(tmp_path.rglob("*")) == before
