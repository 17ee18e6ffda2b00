"""The documentation names what there is: imports, keys, options, files, modules; and every key is on a page."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from documented import PAGES, ROOT, blocks, file_of, kind, spans
from omegaconf import OmegaConf

from morphtrain import schema
from morphtrain.schema.names import keys

OPTION_FILES = [path for group in schema.OPTIONS for path in sorted((schema.CONF / group).glob("*.yaml"))]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
IMPORT = re.compile(r"^ *from (morphtrain[\w.]*) import ([\w, ]+)$", re.MULTILINE)


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


TYPED = re.compile(r"\+{0,2}([a-z_]+)((?:\.\w+)*)(?:=(.*))?")
PATH = re.compile(r"(?:tests|benchmarks|morphtrain|conf|docs|notebooks)/[\w./-]*")
MODULE = re.compile(r"morphtrain(?:\.\w+)+")
# Names that look like keys: attributes of Python, and what is completed; names of the reader, or of the example in
# docs/adding-an-option.md.
ATTRIBUTES = ("model.float", "loss.backward", "gradient.py", "prune.la")
OF_A_TEMPLATE = ("data.batch_size", "model.optimizer", "model.scheduler")  # lightning-hydra-template's own keys
OWN = ("toy", "mine", "shapes", "signum", "weakest", "momentum", "Net", "...")
PRESETS = ("sweep", "experiment", "launcher")


def words_of(page: Path) -> Iterator[tuple[int, str]]:
    for line, span in spans(page):
        yield from ((line, word.strip("'(),;:")) for word in span.split())


def known_keys() -> dict[str, set[str]]:
    """What may follow the first part of a dotted key."""
    found = {group: {"name", "_target_"} for group in schema.OPTIONS}
    for group, options in schema.OPTIONS.items():
        for option in options:
            found[group] |= set(keys(group, option))
    return found


def of_hydra() -> dict[str, set[str]]:
    """The keys of the sweepers and of the launchers, whichever is chosen."""
    sweepers = [OmegaConf.load(path) for path in (schema.CONF / "hydra" / "sweeper").glob("*.yaml")]
    presets = [OmegaConf.load(path) for path in (schema.CONF / "launcher").glob("*.yaml")]
    launchers: Any = [OmegaConf.select(preset, "hydra.launcher") or {} for preset in presets]
    return {
        "sweeper": {"sampler", "pruner", *(key for node in sweepers for key in node)},
        "launcher": {str(key) for node in launchers for key in node},
    }


def check_key(group: str, rest: str, known: dict[str, set[str]], hydra: dict[str, set[str]]) -> bool:
    """Whether there is a key of this name in a group, or of Hydra's."""
    first, *more = rest.removeprefix(".").split(".")
    if group == "hydra":
        return first not in hydra or not more or more[0] in hydra[first]
    return first in known[group] or f"{group}.{first}" in (*ATTRIBUTES, *OF_A_TEMPLATE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_keys_and_options_in_the_text_are_there(page: Path) -> None:
    known, hydra = known_keys(), of_hydra()
    top = {field.name for kind in (schema.Config, schema.MaxBatch) for field in fields(kind)}
    presets = {place: {path.stem for path in (schema.CONF / place).glob("*.yaml")} for place in PRESETS}
    stale = []
    for line, word in words_of(page):
        typed = TYPED.fullmatch(word)
        if typed is None:
            continue
        key, rest, value = typed.groups()
        if rest and (key in known or key == "hydra"):
            right = check_key(key, rest, known, hydra)
        elif value and key in known:
            options = {*schema.OPTIONS[key], *(path.stem for path in (schema.CONF / key).glob("*.yaml")), *OWN}
            right = key in top and set(re.split(r"[,|]", value)) <= {*options, key}
        elif value and key in presets and word.startswith("+"):
            right = set(value.split(",")) <= {*presets[key], *OWN, "<question>"}
        else:
            continue
        if not right:
            stale.append(f"{page.name}:{line}: {word}")
    assert stale == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_and_modules_in_the_text_are_there(page: Path) -> None:
    made = {file_of(block) for block in blocks(page) if kind(block) == "file"}
    stale = []
    for line, word in words_of(page):
        if PATH.fullmatch(word) and "toy" not in word and word not in made:
            right = (ROOT / word).exists() or (page.parent / word).exists()
        elif MODULE.fullmatch(name := word.partition("(")[0]):
            right = is_there(name)
        else:
            continue
        if not right:
            stale.append(f"{page.name}:{line}: {word}")
    assert stale == []


def is_there(name: str) -> bool:
    """Whether it is a module, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        if found is not None:
            value: Any = importlib.import_module(module) if parts[count:] else None
            for part in parts[count:]:
                if not hasattr(value, part):
                    return False
                value = getattr(value, part)
            return True
    return False


def test_a_name_that_is_not_there_is_found() -> None:
    known, hydra = known_keys(), of_hydra()
    assert check_key("prune", ".lasso_ratio", known, hydra) and not check_key("prune", ".laso_ratio", known, hydra)
    assert check_key("hydra", ".sweeper.n_trials", known, hydra)
    assert not check_key("hydra", ".sweeper.trials", known, hydra)
    assert check_key("hydra", ".run.dir", known, hydra)
    assert is_there("morphtrain.morph.effective.fold") and not is_there("morphtrain.morph.effective.unfold")
    assert not is_there("morphtrain.morphing")


def test_every_page_is_on_the_map() -> None:
    """A reader finds each guide from the first page, in a step or two; mkdocs.yml has every page."""
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f" {page}\n" not in menu] == []
    first = (ROOT / "docs" / "index.md").read_text()
    assert [page for page in pages if page.startswith("guides/") and f"({page}" not in first] == []


def test_what_does_not_pay_is_told_in_numbers_of_the_pages_that_it_links_to() -> None:
    """Numbers with a point: those of a section stand on one of the pages that the section links to."""
    page = ROOT / "docs" / "when-it-does-not-pay.md"
    sections = re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE)
    told = [
        (section, set(re.findall(r"(?<![\d.`=])\d+\.\d+(?![\d.])", without_links(section)))) for section in sections
    ]
    assert sum(len(numbers) for _, numbers in told) > 60
    for section, numbers in told:
        links = re.findall(r"\]\(([\w./-]+\.md)", section)
        there = " ".join((page.parent / link).read_text() for link in links)
        assert {number for number in numbers if number not in there} == set(), section.splitlines()[0]


def without_links(text: str) -> str:
    """The text with neither addresses nor commands."""
    return re.sub(r"\]\([^)]*\)|^ {8}.*$", "]", text, flags=re.MULTILINE)
