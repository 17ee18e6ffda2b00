"""The table of what does not go together: each line is refused in a line, and what that says works does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from itertools import chain, combinations, product
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Answer

import morphtrain
from morphtrain import schema
from morphtrain.errors import Incompatible, UserError
from morphtrain.experiment.declaration import key_of, merged
from morphtrain.schema.compatibility import CONFLICTS, Conflict, chosen

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
CHOICE = re.compile(r"([\w.]+)(!?=)(\S+)")

# What some options need to be composed at all.
NEEDED = {
    ("grow=wider",): "grow.at_epochs=[2]",
    ("grow=deeper",): "grow.at_epochs=[2]",
    ("grow=selective",): "grow.at_epochs=[2] prune=prunetrain",
    ("grow=morphnet",): "prune=prunetrain",
    ("grow=morphnet", "prune=prunetrain"): "prune.stop_epoch=10",
    ("grow=morphnet", "prune=morphnet"): "prune.stop_epoch=10",
    ("model=torchvision",): "model.name=resnet18",
}
# Values for lines with != that exclude the default.
ANOTHER = {"compile": "default", "data.infobatch": "0.5", "data.progressive": "0.5", "clip_norm": "1"}
ANOTHER |= {"data.mixup": "0.2", "data.cutmix": "1"}
ANOTHER |= {"model.weights": "base.pt"}


def composed(overrides: list[str]) -> schema.Config:
    """The config of overrides of which the last of a key counts; keys of a group's option go with it."""
    last = merged(overrides)
    options = {key_of(override): number for number, override in enumerate(overrides)}
    kept = [o for o in last if options[key_of(o)] >= options.get(key_of(o).split(".")[0], 0)]
    for choices, needed in NEEDED.items():
        if set(choices) <= set(kept):
            kept = merged(needed.split(), kept)
    return morphtrain.compose(*kept)


def makings(choice: str) -> list[list[str]]:
    """Overrides that make a choice, with each of its values, and in each option that has its key."""
    parts = [list(_makings(*CHOICE.fullmatch(part).groups())) for part in choice.split()]
    made = (
        overrides for overrides in product(*parts) if not any(contradict(*two) for two in combinations(overrides, 2))
    )
    return [list(chain(*overrides)) for overrides in made]


def _makings(key: str, sign: str, values: str) -> Iterator[list[str]]:
    group, _, name = key.partition(".")
    named = values.split("|")
    if sign == "!=":
        named = [value for value in others(key) if value not in named]
    holders: list[list[str]] = [[]]
    if name and chosen(morphtrain.compose(), f"{key}!=") is None:  # the default option has no such key
        kinds = schema.OPTIONS[group].items()
        holders = [[f"{group}={option}"] for option, kind in kinds if name in {field.name for field in fields(kind)}]
    made = [[*holder, f"{key}={value}"] for holder in holders for value in named]
    assert any(map(is_valid, made)), f"{key}: nothing makes this choice"
    yield from filter(is_valid, made)


def is_valid(overrides: list[str]) -> bool:
    """Whether a choice is one by itself: not every option that has a key takes all of its values."""
    try:
        composed(overrides)
    except Incompatible:
        return True
    except UserError:
        return False
    return True


def others(key: str) -> list[str]:
    if key in schema.OPTIONS:
        return [option for option in schema.OPTIONS[key] if option != "custom"]
    default = chosen(morphtrain.compose(), f"{key}!=")
    return [*([] if default is None else [default.partition("=")[2]]), *([ANOTHER[key]] if key in ANOTHER else [])]


def contradict(one: list[str], other: list[str]) -> bool:
    both = [dict(override.split("=", 1) for override in side) for side in (one, other)]
    return any(both[0][key] != both[1][key] for key in both[0].keys() & both[1].keys())


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda conflict: f"{conflict.one} with {conflict.other}")
def test_a_conflict_is_refused_in_a_line_and_what_that_says_works(conflict: Conflict) -> None:
    keys = [CHOICE.fullmatch(part)[1] for part in f"{conflict.one} {conflict.other}".split()]
    works = [match[0].rstrip(",;") for match in CHOICE.finditer(conflict.instead)]
    assert works, "an override that works"
    asked = 0
    for one, other in product(makings(conflict.one), makings(conflict.other)):
        if contradict(one, other):
            continue
        asked += 1
        with pytest.raises(Incompatible) as refused:
            composed([*one, *other])
        said = str(refused.value)
        assert "\n" not in said and said.endswith(f": {conflict.why}; {conflict.instead} works")
        assert all(f"{key}=" in said for key in keys)
        for override in works:
            composed([*one, *other, override])
    assert asked


def test_the_page_prints_the_table() -> None:
    lines = [f"- `{c.one}` with `{c.other}`: {c.why}; {c.instead} works" for c in CONFLICTS]
    assert [line for line in PAGE.read_text().splitlines() if line.startswith("- ")] == lines


@pytest.mark.parametrize(
    ("overrides", "choice", "made"),
    [
        ([], "compile=none", "compile=none"),
        ([], "compile!=none", None),
        (["compile=max"], "compile!=none", "compile=max"),
        (["compile=max"], "compile=default|max", "compile=max"),
        (["precision=bf16"], "precision=o0|bf16", "precision=bf16"),
        (["precision=bf16"], "precision!=o0|bf16", None),
        ([], "data.infobatch!=0", None),
        (["data.infobatch=0.5"], "data.infobatch!=0", "data.infobatch=0.5"),
        ([], "clip_norm=null", "clip_norm=null"),
        ([], "optimizer.nesterov=true", "optimizer.nesterov=true"),
        (["model=vgg8", "model.batch_norm=false"], "model.batch_norm=false", "model.batch_norm=false"),
        (["model=torchvision", "model.name=resnet18"], "model=torchvision", "model=torchvision"),
        ([], "prune=none methods=[]", "prune=none methods=[]"),
        (["methods=[{_target_: a.B}]"], "prune=none methods=[]", None),
        # An option without the key, and parts of the user's own.
        ([], "prune.round_to=auto", None),
        ([], "prune.round_to!=auto", None),
        (["prune=custom", "prune._target_=a.B", "+prune.round_to=auto"], "prune.round_to=auto", None),
        (["prune=custom", "prune._target_=a.B"], "prune=none", None),
        (["prune=custom", "prune._target_=a.B"], "prune!=none", None),
        (["data=custom", "data._target_=a.B", "data.infobatch=0.5"], "data.infobatch!=0", "data.infobatch=0.5"),
    ],
)
def test_what_makes_a_choice(overrides: list[str], choice: str, made: str | None) -> None:
    assert chosen(morphtrain.compose(*overrides), choice) == made


def test_a_part_of_a_config_makes_the_choices_that_it_has() -> None:
    config = SimpleNamespace(compile="max")
    assert chosen(config, "compile!=none") == "compile=max"
    assert chosen(config, "precision!=o0") is None


def test_an_experiment_that_meets_a_conflict_does_not_begin(answer: Answer, tmp_path: Path) -> None:
    said = answer("+experiment=lasso_ratio", "tracking=none", "batch_policy=fill_memory", "device=cpu")
    assert "batch_policy.budget=null with device=cpu: only a CUDA device" in said and "\n" not in said
    assert not list(tmp_path.rglob("experiment.yaml"))
