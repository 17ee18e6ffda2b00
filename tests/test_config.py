"""The config files and the schema say the same, and every option has its module."""

from __future__ import annotations

import importlib
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from morphtrain import explained, schema
from morphtrain.errors import UserError
from morphtrain.schema import CONF
from morphtrain.schema.checks import check_share

OPTION_FILES = [path for group in schema.OPTIONS for path in sorted((CONF / group).glob("*.yaml"))]

# What an option file leaves to the user.
REQUIRED = {
    "data=hf": ["data.root=pictures"],
    "model=torchvision": ["model.name=resnet18"],
    "model=custom": ["model._target_=my_package.Net"],
}
OWN = set(schema.OPTIONS) - {"model", "timing"}
REQUIRED |= {f"{group}=custom": [f"{group}._target_=my_package.Part"] for group in OWN}
NOTE = re.compile(r"# (.*)")
GROWN = ["prune=prunetrain", "prune.stop_epoch=10"]
REQUIRED |= {f"grow={name}": ["grow.at_epochs=[2]", *GROWN] for name in ("wider", "deeper", "selective")}
REQUIRED["grow=morphnet"] = GROWN


def composed(*overrides: str):
    with initialize_config_dir(str(CONF)):
        return compose("config", overrides=list(overrides))


@pytest.mark.parametrize("path", OPTION_FILES, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_option_file_parses_and_has_its_module(path: Path) -> None:
    group = path.parent.name
    choice = f"{group}={path.stem}"
    config = schema.parse(composed(choice, *REQUIRED.get(choice, [])))
    option = getattr(config, group)
    name = schema.option_of(vars(option))
    assert isinstance(option, schema.OPTIONS[group][name])
    if group != "timing" and name != "custom":
        assert callable(importlib.import_module(f"morphtrain.{group}.{name}").build)


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


def test_help_shows_every_key_and_every_comment() -> None:
    """Of all options: in each round another one of each group."""
    options = {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in schema.OPTIONS}
    for round in range(max(map(len, options.values()))):
        chosen = {group: names[round % len(names)] for group, names in options.items()}
        with initialize_config_dir(str(CONF)):
            config = compose("config", [f"{group}={name}" for group, name in chosen.items()], return_hydra_config=True)
        shown = explained.config(_root_=config).replace("$$", "$")
        first, *sections = re.split(r"\n\n(?=\w+=\w+ +\(there are )", shown)
        top, _, _ = (CONF / "config.yaml").read_text().partition("\nhydra:")
        assert [note for note in NOTE.findall(top) if note not in first] == []
        assert {key for key in config if key not in chosen and f"\n{key}:" not in first} == {"hydra"}
        assert len(sections) == len(chosen)
        for section in sections:
            group, _, name = section.partition(" ")[0].partition("=")
            assert name == chosen[group]
            text = (CONF / group / f"{name}.yaml").read_text()
            text = text.split("\ndefaults: [")[0]  # its base explains the keys
            assert [note for note in NOTE.findall(text) if note not in section] == [], (group, name)
            keys = set(config[group]) - {"name"}
            assert [key for key in keys if f"\n  {key}:" not in section] == [], (group, name)


def test_groups_folders_and_modules_are_the_same() -> None:
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert set(schema.OPTIONS) <= folders
    presets = {
        *(f"resnet{depth}" for depth in (8, 20, 32, 50, 56)),
        *(f"vgg{depth}" for depth in (8, 11, 13, 16)),
        *("mobilenet_v1", "mobilenet_v2"),
    }
    assert {path.stem for path in (CONF / "model").glob("*.yaml")} == presets | set(schema.OPTIONS["model"])
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


@pytest.mark.parametrize(
    ("overrides", "kind", "name"),
    [
        (["model=resnet50", "model.stem=cifar"], schema.model.ResNet, "resnet"),
        (["model=torchvision", "model.name=resnet18"], schema.model.Torchvision, "torchvision"),
        (["model=custom", "model._target_=a.B"], schema.model.CustomModel, "custom"),
        (
            ["model=custom", "model._target_=a.B", "+model.name=resnet", "+model.source=vgg"],
            schema.model.CustomModel,
            "custom",
        ),
    ],
)
def test_the_option_is_the_same_composed_typed_and_stored(overrides: list[str], kind: type, name: str) -> None:
    config = composed(*overrides)
    model = schema.parse(config).model
    stored = json.loads(json.dumps(asdict(model)))
    assert type(model) is kind
    assert [schema.option_of(node) for node in (config.model, vars(model), stored)] == [name] * 3
    assert schema.stored_option("model", stored) == model


WRONG_MODELS = {
    "stem": (["model.stem=mnist"], "model.stem=mnist: must be one of cifar, imagenet"),
    "depth": (["model=vgg", "model.depth=19"], "model.depth=19: must be one of 8, 11, 13, 16"),
    "head": (["model=vgg11", "model.head=small"], "model.head=small: must be one of cifar, imagenet"),
    "width": (["model=vgg11", "model.width=0"], "model.width=0: must be 1 or more"),
    "dropout": (["model=alexnet", "model.dropout=1"], "model.dropout=1.0: must be 0 or more and below 1, or null"),
    "version": (["model=mobilenet", "model.version=3"], "model.version=3: must be one of 1, 2"),
    "multiplier": (["model=mobilenet", "model.width_multiplier=0"], "model.width_multiplier=0.0: must be above 0"),
    "no name": (["model=torchvision"], "model.name: missing"),
    "source": (["model=torchvision", "model.source=timm"], "model.source=timm: must be one of resnet, vgg"),
    "weights": (
        ["model=torchvision", "model.name=a", "+model.options.weights=X"],
        r"model.options.weights=X: .* model\.weights",
    ),
    "pretrained": (["model=torchvision", "model.name=a", "+model.options.pretrained=true"], "model.options.pretrained"),
    "classes": (["model=torchvision", "model.name=a", "+model.options.num_classes=3"], "model.options.num_classes=3"),
    "no target": (["model=custom"], "model._target_: missing"),
    "no module": (["model=custom", "model._target_=Net"], "model._target_=Net: must be .* my_package.Net"),
    "no path": (["model=custom", "model._target_=my-package.Net"], "model._target_=my-package.Net"),
    "missing": (["model=custom", "model._target_=a.B", "+model.width=???"], "model.width: missing"),
    "nested": (["model=custom", "model._target_=a.B", "+model.a={b:???}"], "model.a.b: Missing mandatory value"),
    "nowhere": (["model=custom", "model._target_=a.B", "+model.a=${b}"], "model.a: Interpolation key 'b' not found"),
    "number as key": (["model=custom", "model._target_=a.B", "+model.a={1:8}"], r"model.a=\{1: 8\}: .*keys: text"),
    "not a number": (["model=custom", "model._target_=a.B", "+model.a=nan"], "model.a=nan: must be"),
    "key of Hydra": (["model=custom", "model._target_=a.B", "+model._partial_=true"], "model._partial_=true: .* left"),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_a_wrong_key_of_a_model_is_named(case: str) -> None:
    overrides, message = WRONG_MODELS[case]
    with pytest.raises(UserError, match=message):
        schema.parse(composed(*overrides))


def test_the_keys_of_a_users_network_arrive_as_plain_data() -> None:
    config = composed(
        "model=custom",
        "model._target_=a.B",
        "+model.width=${epochs}",
        "+model.stages=[{width:8,stride:2},{width:16,stride:1}]",
        "+model.act={_target_:torch.nn.ReLU}",
        "epochs=7",
    )
    model = schema.parse(config).model
    assert model._target_ == "a.B"
    assert model.arguments == {
        "width": 7,
        "stages": [{"width": 8, "stride": 2}, {"width": 16, "stride": 1}],
        "act": {"_target_": "torch.nn.ReLU"},
    }
    assert {type(value) for value in model.arguments.values()} == {int, list, dict}
    assert type(model.arguments["stages"][0]) is dict


@pytest.mark.parametrize("key", ["seed", "prune", "timing"])
def test_a_missing_part_is_named(key: str) -> None:
    config = composed()
    OmegaConf.set_struct(config, False)
    del config[key]
    with pytest.raises(UserError, match=f"{key}: missing"):
        schema.parse(config)


@pytest.mark.parametrize(("epochs", "quarter", "third"), [(1, 1, 1), (20, 5, 7), (180, 45, 60)])
def test_epochs_may_be_shares_of_the_run(epochs: int, quarter: int, third: int) -> None:
    pruning = ("prune=prunetrain", "prune.start_epoch=25%", "prune.stop_epoch=33.3%", "prune.interval=0.1%")
    further = "{_target_:morphtrain.options.method,option:grow/deeper,at_epochs:[25%,4]}"
    own = "{_target_:my_package.Method,option:grow/deeper,at_epochs:[25%]}"
    adabatch = ("batch_policy=adabatch", "batch_policy.every=33.3%")
    config = schema.compose(f"epochs={epochs}", *pruning, *adabatch, f"methods=[{further},{own}]")
    prune: Any = config.prune
    assert (prune.start_epoch, prune.stop_epoch, prune.interval) == (quarter, third, 1)
    assert config.batch_policy.every == third  # type: ignore[union-attr]
    assert [method.arguments["at_epochs"] for method in config.methods] == [[quarter, 4], ["25%"]], "what is not ours"


def test_a_network_may_start_narrow_and_be_widened_once_early() -> None:
    config = schema.compose("grow=wider", "grow.at_epochs=[10%]", "epochs=40")
    assert asdict(config)["grow"]["at_epochs"] == [4], "as a checkpoint has it"
    rounds = schema.compose("grow=morphnet", "grow.round_epochs=25%", "prune=morphnet", "prune.stop_epoch=25%")
    assert asdict(rounds)["grow"]["round_epochs"] == 15


@pytest.mark.parametrize(
    ("value", "ends", "wanted"),
    [
        (0.0, {}, "above 0 and below 1, as a share of all"),
        (1.0, {"zero": True}, "0 or more and below 1, as a share of all"),
        (-0.1, {"zero": True, "one": True}, "0 or more and at most 1, as a share of all"),
        (1.1, {"one": True}, "above 0 and at most 1, as a share of all"),
        (math.nan, {"zero": True, "one": True}, "0 or more and at most 1, as a share of all"),
    ],
)
def test_what_is_no_share_is_named_with_the_ends_that_are_allowed(value: float, ends: dict, wanted: str) -> None:
    with pytest.raises(UserError) as refused:
        check_share("data.share", value, "all", **ends)
    assert str(refused.value) == f"data.share={value}: must be {wanted}"
    for inside in (0.5, *[0.0] * ends.get("zero", False), *[1.0] * ends.get("one", False)):
        check_share("data.share", inside, "all", **ends)
