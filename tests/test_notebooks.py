"""The notebooks run from top to bottom, and show what their text says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def executed(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The namespace that the notebook's code cells leave, run one after the other in its directory."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(NOTEBOOKS)
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(json.loads((NOTEBOOKS / name).read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), namespace)
    return namespace


def test_every_notebook_is_tested() -> None:
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == {"memory.ipynb"}


def test_one_constant_predicts_the_thesis_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 43 rows, from the shapes of the networks alone; with downsampling no constant would do."""
    shown = executed("memory.ipynb", monkeypatch)
    error = shown["error"]
    assert len(error) == 43
    assert error.median() <= 0.04
    assert error.max() <= 0.10
    assert shown["implied"].max() / shown["implied"].min() < 1.15
    halved = shown["implied_halved"]
    assert halved.max() / halved.min() > 8
    for line in shown["inverse"].values():
        assert line.r_squared > 0.999
        assert line.slope.p < 1e-12
