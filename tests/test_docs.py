"""What the documentation shows: its commands compose, and the names that it imports are there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

import morphtrain

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IMPORT = re.compile(r"^ *from (morphtrain[\w.]*) import ([\w, ]+)$", re.MULTILINE)
OTHERS = (" -m ", " --", "custom", "my_", "<", "hydra.")  # sweeps, printing, options of the reader's own


def commands() -> list[str]:
    """The words of every single run that is shown."""
    lines: list[str] = []
    for page in PAGES:
        lines += re.findall(
            r"^ +python -m morphtrain\.run( [^#\n]*)", page.read_text().replace(" \\\n", " "), re.MULTILINE
        )
    words = {line.strip().split("  ")[0] for line in lines if not any(other in f"{line} " for other in OTHERS)}
    assert len(words) > 15
    return sorted(words)


@pytest.mark.parametrize("command", commands())
def test_a_command_that_is_shown_composes(command: str) -> None:
    morphtrain.compose(*shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_names_that_are_imported_are_there(page: Path) -> None:
    for module, names in IMPORT.findall(page.read_text()):
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), (module, name)
