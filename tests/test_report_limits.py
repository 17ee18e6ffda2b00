"""What limits an answer of the report: runs that are missing, too few, copies, mixed, or disturbed."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from experiment_records import MACHINE, cut, declared, write, write_declaration
from test_report import ARMS, BLOCKS, EPOCHS, LINE, SEEDS, THREE, Page, metrics, reported

from morphtrain.report.build import read


def test_an_experiment_under_way_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    directory = write(tmp_path, declared("ratio", THREE, SEEDS), metrics, EPOCHS)
    cut(directory, 7, "poor", 2)
    cut(directory, 6, "poor", 0)
    found = reported(tmp_path)
    section = found.section("ratio_question")
    assert "Incomplete: 2 of 21 runs have not finished (1 begun, 1 not begun)" in section
    assert "with poor (n = 5 seeds)" in found.answer("ratio_question")
    assert "stopped after 2" in section and "not begun" in section
    assert found.table("ratio_question-small-ratios").loc["poor", "seeds"] == 5


@pytest.mark.parametrize("kind", ["pays", "ratio", "no_worse", "factor", "curves", "line"])
@pytest.mark.parametrize("runs", [True, False])
def test_one_seed_is_no_answer(kind: str, runs: bool, tmp_path: Path) -> None:
    arms = {"pays": ARMS, "line": THREE}.get(kind, THREE)
    x = "model.blocks" if kind == "line" else None
    response = {"response": "test_accuracy"} if kind == "no_worse" else {}
    experiment = declared(kind, arms, (1, 2), x=x, **response)
    directory = write(tmp_path, experiment, metrics, EPOCHS) if runs else write_declaration(tmp_path, experiment)
    for arm in arms if runs else []:
        cut(directory, 2, arm, 1)
    found = reported(tmp_path)
    assert found.answer(f"{kind}_question").startswith("Nothing can be said yet")
    assert "<svg" not in found.html
    assert not list((tmp_path / "report-tables").glob(f"{kind}*"))


def test_copies_of_an_experiment_are_told_apart(tmp_path: Path) -> None:
    for place in ("here", "there"):
        write(tmp_path / place, declared("ratio", THREE, SEEDS), metrics, EPOCHS)
    found = reported(tmp_path)
    page = Page(found.html)
    assert page.wrong == []
    assert len(page.ids) == len(set(page.ids))
    assert {"q-here-ratio_question-small", "q-there-ratio_question-small"} <= set(page.ids)
    assert len(found.table("there-ratio_question-small-ratios")) == len(THREE)


def test_a_line_through_equal_values_or_none_at_all(tmp_path: Path) -> None:
    line = declared("line", LINE, SEEDS, x="model.blocks", y="params")
    configs = {f"blocks_{n}": {"model": {"blocks": n}} for n in BLOCKS}
    for params, said in ((7.0, "does not change with"), (math.inf, "Nothing can be said yet")):
        shutil.rmtree(tmp_path / "line_question-small", ignore_errors=True)
        write(tmp_path, line, lambda arm, seed, epoch, params=params: {"params": params}, EPOCHS, configs)
        assert said in reported(tmp_path).html


def test_numbers_that_no_ratio_is_made_of_are_the_answer_of_their_own_section_only(tmp_path: Path) -> None:
    write(tmp_path, declared("ratio", THREE, SEEDS, response="morph_seconds"), never_morphs, EPOCHS)
    write(tmp_path / "beside", declared("ratio", THREE, SEEDS), metrics, EPOCHS)
    html = reported(tmp_path).html
    assert re.search("These numbers cannot be analysed: .*a ratio needs numbers above 0", html)
    assert len(reported(tmp_path).table("beside-ratio_question-small-ratios")) == len(THREE)


def never_morphs(arm: str, seed: int, epoch: int) -> dict[str, float]:
    return {"morph_seconds": 0.0}


def test_a_copy_inside_an_experiment_is_no_part_of_it(tmp_path: Path) -> None:
    directory = write(tmp_path, declared("ratio", THREE, SEEDS), metrics, EPOCHS)
    before = reported(tmp_path).table("ratio_question-small-ratios")
    for copy in ("3_old", "aside"):
        shutil.copytree(directory / "3", directory / copy)
        for path in (directory / copy).rglob("records.jsonl"):
            path.write_text(path.read_text().replace('_seconds": ', '_seconds": 9'))
    (directory / "1" / "good" / ".hydra" / "config.yaml").unlink()
    pd.testing.assert_frame_equal(reported(tmp_path).table("ratio_question-small-ratios"), before)


def test_no_two_experiments_have_one_name(tmp_path: Path) -> None:
    for place in ("a b", "a-b", "A-b"):
        write(tmp_path / place, declared("ratio", THREE, SEEDS), metrics, EPOCHS)
    page = Page(reported(tmp_path).html)
    assert page.wrong == [] and len(page.ids) == len(set(page.ids))
    assert len([name for name in page.ids if name.lower().startswith("q-a-b")]) >= 3


def test_too_few_pairs_for_significance_have_no_p(tmp_path: Path) -> None:
    write(tmp_path, declared("ratio", THREE, range(1, 6)), metrics, EPOCHS)
    found = reported(tmp_path)
    assert found.table("ratio_question-small-ratios")[["p", "Wilcoxon p"]].isna().all(axis=None)
    assert "With fewer than 6 pairs significance is out of reach" in found.section("ratio_question")


def test_runs_of_an_arm_that_chose_different_formats_are_flagged(tmp_path: Path) -> None:
    def formats(arm: str, seed: int, epoch: int) -> dict[str, float]:
        chosen = {"precision_bits": 32 if (arm, seed) == ("poor", 3) else 16, "channels_last": float(arm != "good")}
        return {**metrics(arm, seed, epoch), **chosen}

    directory = write(tmp_path, declared("ratio", THREE, SEEDS), formats, EPOCHS)
    found = f"poor: {len(SEEDS) - 1} runs in 16 bits channels_last and 1 run in 32 bits channels_last"
    note = f"Mixed formats: auto chose differently in the runs of one arm ({found})."
    (said,) = (note for note in read(directory, tmp_path).notes if "formats" in note)
    assert said == f"{note} In other formats than dense, as auto chose: good in 16 bits contiguous."
    cut(directory, 3, "poor", 1)
    (note,) = (note for note in read(directory, tmp_path).notes if "formats" in note)
    assert note == "In other formats than dense, as auto chose: good in 16 bits contiguous.", "which it may"


def test_other_machines_other_code_and_other_work_are_flagged(tmp_path: Path) -> None:
    def disturbed(arm: str, seed: int, epoch: int) -> dict[str, float]:
        """Seed 7's runs were measured once."""
        return {**metrics(arm, seed, epoch), "contended": 1, "reference_seconds": 1.0 if seed == 7 else 1.0 + epoch}

    directory = write(tmp_path, declared("ratio", THREE, SEEDS), disturbed, EPOCHS)
    assert "Mixed" not in reported(tmp_path).html
    path = directory / "3" / "poor" / "environment.json"
    path.write_text(json.dumps({**MACHINE, "before": [{**MACHINE, "host": "other", "morphtrain_commit": "beef"}]}))
    section = reported(tmp_path).section("ratio_question")
    assert "Mixed machines: the runs come from 2" in section
    assert "Mixed code: the runs come from 2 commits" in section
    assert f"Others used the machine in {21 * EPOCHS} of {21 * EPOCHS} epochs, in 21 of 21 runs" in section
    assert "in 3 of these calibrated times do not allow for it" in section
    for run in (directory / "7").iterdir():
        cut(directory, 7, run.name, 0)
    assert "in 18 of 21 runs; calibrated times allow for it" in reported(tmp_path).section("ratio_question")


def test_runs_of_an_arm_in_different_numbers_of_processes_are_flagged(tmp_path: Path) -> None:
    def several(arm: str, seed: int, epoch: int) -> dict[str, float]:
        return {**metrics(arm, seed, epoch), **({"processes": 2.0} if (arm, seed) == ("poor", 3) else {})}

    directory = write(tmp_path, declared("ratio", THREE, SEEDS), several, EPOCHS)
    (note,) = (note for note in read(directory, tmp_path).notes if "processes" in note)
    counts = f"poor: {len(SEEDS) - 1} runs in one process and 1 run in 2 processes"
    assert note.endswith(f"Mixed numbers of processes: {counts}; their times are not comparable.")
