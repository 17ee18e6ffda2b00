"""Every two options that go together, of all groups at once: trained, changed, stored, resumed to the same bits.

    pytest -s tests/test_pairs.py              # prints how many runs have how many pairs
    pytest -s -m slow tests/test_pairs.py      # all threes of options, and the pairs with networks and compiling

A run has a value of every factor, so that few runs have all pairs (`covering.py`), except for those that `CONFLICTS`
excludes. Options are found: a new one takes part by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from covering import Item, Row, covering
from omegaconf import OmegaConf
from test_resume import assert_same, contents

import morphtrain
from morphtrain import compilation, schema
from morphtrain.errors import Incompatible
from morphtrain.method import Method
from morphtrain.schema.compatibility import CONFLICTS, chosen
from morphtrain.state import Run
from morphtrain.trainer import auto, begin_epoch, build_run, checkpoint, finish_epoch, start, train_epoch
from morphtrain.wording import as_yaml

# Groups that say what is trained, on what, and what is written down of it, not how.
LEFT_OUT = {"model", "data", "tracking", "timing"}
SAME = (
    *("data=synthetic", "data.train_samples=48", "data.val_samples=8", "data.image_size=16", "data.num_classes=4"),
    *("epochs=8", "device=cpu", "tracking=none", "methods=[{_target_: test_pairs.Cut}]"),
)
RESNET = ("model=resnet8", "model.width=8")

# Keys with which two epochs see what takes many by default, in whichever options have them.
SHORT = {
    "at_epochs": [1],
    "batch_size": 16,  # three steps an epoch
    "budget": "1GiB",
    "eps": 1e-6,  # below 6e-8, what AdamW divides by is 0 in float16
    "every": 1,
    "ghost_batch_size": 4,
    "init_scale": 256.0,  # steps at the default overflow at first, and are skipped
    "interval": 1,
    "lr": 0.03,  # at which networks without batch norm learn, too
    "max_batch_size": 32,
    "max_params": 4.0,
    "min_channels": 2,  # so that there is one to cut
    "new_lr_factor": 2.0,
    "patience": 2,
    "round_epochs": 1,
    "round_to": 1,
    "start_epoch": 1,
    "threshold": 0.3,
}
# Keys that make another method of the options that have them: a further value of their groups.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"dtype": "float16"},
    {"regulariser": "group_lasso"},
    {"max_micro_batch": 6},
    {"label_smoothing": 0.1},
)
MORE_VARIANTS: tuple[dict[str, Any], ...] = (
    {"update": "subgradient"},
    {"residual": "gating"},
    {"lasso_ratio_of": "loss", "lasso_ratio": 0.9},
    {"importance": "taylor"},
    {"operator": "layer", "kernel": 3},
    {"operator": "deeper", "keep_fraction": 0.9},
    {"start": "half_half"},
    {"inherit": False, "new_lr_factor": 1.0},
    {"rounding": "stochastic"},
)
# Keys of no such group that change how steps are taken, where the config has them.
SWITCHES = {
    "clip_norm": (None, 0.5),
    "data.infobatch": (0.0, 0.5),
    "data.order": ("shuffled", "cycle"),
    "data.progressive": (1.0, 0.5),
    "data.mixup": (0.0, 0.4),
    "data.cutmix": (0.0, 1.0),
    "ema": (None, 0.3),
    "memory_format": ("contiguous", "channels_last"),
}
NETWORKS = (
    RESNET,
    ("model=resnet8", "model.width=8", "model.shortcut=B"),
    ("model=resnet8", "model.width=4", "model.bottleneck=true", "model.layers=3"),
    ("model=vgg8", "model.width=4"),
    ("model=alexnet",),
    ("model=alexnet", "model.batch_norm=true"),
    ("model=mobilenet_v1", "model.width_multiplier=0.25"),
    ("model=mobilenet_v2", "model.width_multiplier=0.25"),
)


class Cut(Method):
    """The change of structure that every run has, whatever else changes: a channel less after the first epoch."""

    follows_channels = True

    def after_epoch(self, run: Run) -> None:
        if run.epoch == 1:
            widest = max(run.graph.spaces, key=lambda space: space.size)
            run.graph.reindex(widest, range(widest.size - 1), run.optimizer)
            run.shape_changed("cut")


@dataclass(frozen=True)
class Level:
    """A value of a factor: as it is called, and as the config has it."""

    name: str
    value: Any = field(compare=False)


def levels(group: str, variants: Sequence[Mapping[str, Any]]) -> list[Level]:
    """The options of a group, except the user's own and those that have keys without a default."""
    found = []
    for name, kind in schema.OPTIONS[group].items():
        if issubclass(kind, schema.Custom):
            continue
        keys = {one.name for one in fields(kind)}
        short = {key: value for key, value in SHORT.items() if key in keys}
        options = [{}, *(variant for variant in variants if variant.keys() <= keys)]
        found += [level(group, name, {**short, **option}, option) for option in options]
    return [one for one in found if one is not None]


def level(group: str, name: str, keys: Mapping[str, Any], told: Mapping[str, Any]) -> Level | None:
    """An option with these keys; `told` are those that its name has to tell; None if others have no default."""
    values: Any = OmegaConf.to_container(OmegaConf.load(schema.CONF / group / f"{name}.yaml"))
    values |= keys
    if "???" in values.values():
        return None
    title = " ".join([f"{group}={name}", *(f"{key}={as_yaml(value)}" for key, value in told.items())])
    return Level(title, schema.typed(schema.OPTIONS[group][name], values, group))


def switch(key: str, values: Sequence[Any]) -> list[Level]:
    return [Level(f"{key}={as_yaml(value)}", value) for value in values]


BASE = morphtrain.compose(*SAME, *RESNET)


def has(key: str) -> bool:
    *groups, name = key.split(".")
    return hasattr(getattr(BASE, groups[0]) if groups else BASE, name)


def factors(variants: Sequence[Mapping[str, Any]]) -> dict[str, list[Level]]:
    groups = {group: levels(group, variants) for group in schema.OPTIONS if group not in LEFT_OUT}
    return groups | {key: switch(key, values) for key, values in SWITCHES.items() if has(key)}


def excluded(*items: Item) -> bool:
    """Whether the table excludes items, whatever else a run has."""
    settled = {name: value for name, value in vars(BASE).items() if name not in FACTORS}
    data = {name: value for name, value in vars(BASE.data).items() if f"data.{name}" not in FACTORS}
    config = SimpleNamespace(**{**settled, "data": SimpleNamespace(**data)})
    for factor, chosen_level in items:
        assert isinstance(chosen_level, Level)
        *groups, name = factor.split(".")
        setattr(getattr(config, groups[0]) if groups else config, name, chosen_level.value)
    return any(chosen(config, conflict.one) and chosen(config, conflict.other) for conflict in CONFLICTS)


FACTORS = factors(VARIANTS)
ROWS = covering(FACTORS, excluded)


def config_of(items: Mapping[str, Any]) -> schema.Config:
    """A config with these levels; put together without Hydra, which takes longer than the epochs."""
    parts = {name: one.value for name, one in items.items() if not name.startswith("data.")}
    data = {name.removeprefix("data."): one.value for name, one in items.items() if name.startswith("data.")}
    if isinstance(parts.get("model"), schema.model.AlexNet):  # at three times that some runs of it diverge
        parts["optimizer"] = replace(parts.get("optimizer", BASE.optimizer), lr=0.01)
    if parts.get("grow", BASE.grow).name == "morphnet" and hasattr(parts.get("prune"), "stop_epoch"):
        parts["prune"] = replace(parts["prune"], stop_epoch=1)  # or what has grown would be shrunk again
    return replace(BASE, **parts, data=replace(BASE.data, **data))


def title(row: Row) -> str:
    return ", ".join(one.name for one in row.values() if isinstance(one, Level))


def check(config: schema.Config, directory: Path) -> None:
    """A few steps, a change of structure, a checkpoint; and from there on as many more twice, to the same bits."""
    run = build_run(config)
    start(run)
    advance(run)
    assert run.change.endswith("cut")
    checkpoint.save(run, directory, None)
    resumed = checkpoint.Checkpoint(directory / checkpoint.LAST).restore(config)
    start(resumed)
    trained, weights = run.progress, copy.deepcopy(run.model.state_dict())
    ends = []
    for name, each in {"whole": run, "resumed": resumed}.items():
        advance(each)
        (directory / name).mkdir(exist_ok=True)
        checkpoint.save(each, directory / name, None)
        ends.append(contents(directory / name / checkpoint.LAST))
    assert_same(*ends)
    assert trained > 0 and run.progress > trained
    assert any(not torch.equal(value, weights[name]) for name, value in run.model.named_parameters() if name in weights)


def advance(run: Run) -> None:
    begin_epoch(run)
    train_epoch(run)
    finish_epoch(run)


@pytest.fixture(autouse=True)
def quickly_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "MOST_ROUNDS", auto.LEAST_ROUNDS)


@pytest.mark.parametrize("row", ROWS, ids=[f"{number:02}" for number in range(len(ROWS))])
def test_options_go_together(row: Row, tmp_path: Path) -> None:
    print(title(row))  # which pytest shows of those that fail
    check(config_of(row), tmp_path)


def test_the_runs_have_every_pair_but_those_that_the_table_excludes() -> None:
    items = [(factor, one) for factor, found in FACTORS.items() for one in found]
    pairs = {frozenset(pair) for pair in combinations(items, 2) if pair[0][0] != pair[1][0]}
    seen = {frozenset(pair) for row in ROWS for pair in combinations(row.items(), 2)}
    print(f"{len(ROWS)} runs have all {len(seen)} pairs of {len(items)} values of {len(FACTORS)} factors")
    assert seen == {pair for pair in pairs if not excluded(*pair)}


def test_every_option_takes_part_but_the_users_own() -> None:
    names = {one.name for found in FACTORS.values() for one in found}
    for group in schema.OPTIONS.keys() - LEFT_OUT:
        files = {path.stem for path in (schema.CONF / group).glob("*.yaml")} - {"custom"}
        assert {f"{group}={name}" for name in files} <= names


def test_what_the_table_excludes_is_refused() -> None:
    items = [(factor, one) for factor, found in FACTORS.items() for one in found]
    for pair in combinations(items, 2):
        if pair[0][0] != pair[1][0] and excluded(*pair):
            with pytest.raises(Incompatible):
                config_of(dict(pair))


def failures(rows: Sequence[Row], directory: Path) -> list[str]:
    """What goes wrong in which of these runs."""
    failed = []
    for number, row in enumerate(rows):
        (directory / str(number)).mkdir()
        try:
            check(config_of(row), directory / str(number))
        except Exception as error:  # noqa: BLE001 (to see all that fail)
            failed.append(f"{title(row)}: {type(error).__name__}: {error}")
    print(f"{len(rows)} runs, {len(failed)} failed")
    return failed


@pytest.mark.slow
def test_every_three_options_go_together(tmp_path: Path) -> None:
    assert failures(covering(FACTORS, excluded, strength=3), tmp_path) == []


@pytest.mark.slow
def test_networks_and_compiling_go_together_with_all_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_it_is(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", as_it_is)
    networks = [Level(" ".join(keys), morphtrain.compose(*SAME, *keys).model) for keys in NETWORKS]
    more = factors((*VARIANTS, *MORE_VARIANTS)) | {"model": networks, "compile": switch("compile", ("none", "default"))}
    assert failures(covering(more, excluded), tmp_path) == []
