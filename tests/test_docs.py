"""What the documentation shows: its commands compose, and the names that it imports are there."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

import morphtrain
from morphtrain import lr_finder, schema
from morphtrain.compare.__main__ import parse
from morphtrain.compare.command import check_effect, sides_of
from morphtrain.trainer import train

ROOT = Path(__file__).parents[1]
OPTION_FILES = [path for group in schema.OPTIONS for path in sorted((schema.CONF / group).glob("*.yaml"))]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IMPORT = re.compile(r"^ *from (morphtrain[\w.]*) import ([\w, ]+)$", re.MULTILINE)
OTHERS = (" -m ", " --", "custom", "my_", "<", "hydra.")  # sweeps, printing, options of the reader's own


def shown(command: str) -> list[str]:
    """What follows a command wherever it is shown."""
    pattern = re.compile(rf"^ +python -m morphtrain\.{command}( [^#\n]*)", re.MULTILINE)
    return [words for page in PAGES for words in pattern.findall(page.read_text().replace(" \\\n", " "))]


def commands() -> list[str]:
    """The words of every single run that is shown."""
    lines = [line for line in shown("run") if not any(other in f"{line} " for other in OTHERS)]
    words = {line.strip().split("  ")[0] for line in lines}
    assert len(words) > 15
    return sorted(words)


@pytest.mark.parametrize("command", commands())
def test_a_command_that_is_shown_composes(command: str) -> None:
    words = shlex.split(command)
    target = ["timing.target_accuracy=0.9"] if "+sweep=fastest" in words else []  # which is that of its trial 0
    morphtrain.compose(*words, *target)


@pytest.mark.parametrize("command", sorted(set(shown("compare"))))
def test_a_comparison_that_is_shown_composes(command: str) -> None:
    for overrides in sides_of(*parse(shlex.split(command))).values():
        morphtrain.compose(*overrides)


@pytest.mark.parametrize("command", sorted(set(shown("lr_finder"))))
def test_a_range_test_that_is_shown_composes(command: str) -> None:
    options = lr_finder.parse(shlex.split(command))
    check_effect("a range test", options.overrides)
    morphtrain.compose(*options.overrides)


SHORT = ("tracking=none", "timing.reference=0", "model.width=4")


@pytest.mark.parametrize(("guide", "number"), [("trained-weights", 2), ("longer-runs", 3)])
def test_the_commands_of_a_guide_run_after_each_other(
    guide: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shortened: a thirtieth of the epochs, narrow networks."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "guides" / f"{guide}.md").read_text().replace(" \\\n", " ")
    lines = re.findall(r"^ +python -m morphtrain\.run (.*)", text, re.MULTILINE)
    lines = [line for line in lines if "torchvision" not in line]  # which needs a network and photos
    assert len(lines) == number
    for place, line in enumerate(lines):
        words = [re.sub(r"^epochs=(\d+)", lambda m: f"epochs={max(2, int(m[1]) // 30)}", w) for w in shlex.split(line)]
        words = words if any(word.startswith("epochs=") for word in words) else [*words, "epochs=2"]
        directory = next((w.partition("=")[2] for w in words if w.startswith("hydra.run.dir=")), f"run{place}")
        Path(directory).mkdir(parents=True, exist_ok=True)
        overrides = [word for word in words if not word.startswith("hydra.")]
        overrides += ["prune.round_to=1"] * ("prune=early" in words)  # eight are more than such a layer has
        train(morphtrain.compose(*overrides, *SHORT), Path(directory), {})
        assert morphtrain.load(Path(directory) / "last.pt") is not None


@pytest.mark.parametrize("page", [*PAGES, *BENCHMARKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_names_that_are_imported_are_there(page: Path) -> None:
    for module, names in IMPORT.findall(page.read_text()):
        if "toy" in module:  # which the page tells how to make
            continue
        for name in names.split(","):
            there = hasattr(importlib.import_module(module), name.strip())
            assert there or importlib.util.find_spec(f"{module}.{name.strip()}"), (module, name)


@pytest.mark.parametrize("path", OPTION_FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_key_is_documented(path: Path) -> None:
    cards = [page.read_text() for folder in ("methods", "guides") for page in (ROOT / "docs" / folder).glob("*.md")]
    text = "\n".join([*cards, (ROOT / "docs" / "configuration.md").read_text()])
    keys = set(yaml.safe_load(path.read_text())) - {"name", "source", "defaults", "_target_"}
    assert [key for key in keys if f"`{path.parent.name}.{key}`" not in text and f"`{key}`" not in text] == []


def test_what_the_guides_include_is_there() -> None:
    lines = [line for page in PAGES for line in page.read_text().splitlines() if line.startswith("--8")]
    assert len(lines) >= 6
    for line in lines:
        found = re.fullmatch(r'--8<-- "(.*)"', line)
        assert found and (ROOT / "docs" / "examples" / found[1]).is_file(), line
