"""The config files and the schema say the same, and every option has its module."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.run import CONF

OPTION_FILES = [path for group in schema.OPTIONS for path in sorted((CONF / group).glob("*.yaml"))]


def composed(*overrides: str):
    with initialize_config_dir(str(CONF)):
        return compose("config", overrides=list(overrides))


@pytest.mark.parametrize("path", OPTION_FILES, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_option_file_parses_and_has_its_module(path: Path) -> None:
    group = path.parent.name
    config = schema.parse(composed(f"{group}={path.stem}"))
    option = getattr(config, group)
    assert isinstance(option, schema.OPTIONS[group][option.name])
    if group != "timing":
        assert callable(importlib.import_module(f"morphtrain.{group}.{option.name}").build)


@pytest.mark.parametrize("path", OPTION_FILES, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_key_is_explained(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    for line in lines[1:]:
        key = line.split(":")[0]
        plain = key in (
            "name",
            "defaults",
            "blocks",
            "gamma",
            "in_channels",
            "num_classes",
            "momentum",
            "nesterov",
            "eps",
            "betas",
            "train_samples",
            "val_samples",
            "experiment",
        )
        assert plain or "#" in line, line


def test_groups_folders_and_modules_are_the_same() -> None:
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert set(schema.OPTIONS) <= folders
    presets = {path.stem for path in (CONF / "model").glob("*.yaml")}
    assert presets == {"resnet", "resnet8", "resnet20", "resnet32", "resnet56"}
    for group, options in schema.OPTIONS.items():
        if group != "model":
            assert {path.stem for path in (CONF / group).glob("*.yaml")} == set(options)


def test_numbers_are_converted_as_yaml_users_expect() -> None:
    config = schema.parse(
        composed("optimizer.lr=1", "prune=prunetrain", "prune.threshold=1e-3", "model.blocks=[1,2,3]")
    )
    assert config.optimizer.lr == 1.0
    assert config.prune.threshold == 0.001
    assert config.model.blocks == [1, 2, 3]


@pytest.mark.parametrize("key", ["seed", "prune", "timing"])
def test_a_missing_part_is_named(key: str) -> None:
    config = composed()
    OmegaConf.set_struct(config, False)
    del config[key]
    with pytest.raises(UserError, match=f"{key}: missing"):
        schema.parse(config)
