"""The questions in `conf/experiment`: each composes at all sizes, arm by arm, and all of chapter 3 is asked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.evidence.experiment import CURVE
from morphtrain.experiment.declaration import _arms, declared, typed

FILES = sorted((schema.CONF / "experiment").glob("*.yaml"))
NAMES = [path.stem for path in FILES]
SIZES = {path.stem: list(yaml.safe_load(path.read_text())["hydra"]["sweeper"]["sizes"]) for path in FILES}
OF_THE_THESIS = [name for name in NAMES if "thesis" in SIZES[name]]
RESHAPES = re.compile("prune=|grow=").match  # an override by which a run ends with another structure
# Of the other questions, the arms whose final structure is also trained from scratch.
SHAPED = {"recipe": {"recipe"}, "recipe_elsewhere": {"recipe"}, "format_time": {"pruned_bf16"}}


def composed(overrides: Sequence[str]) -> DictConfig:
    config = compose("config", overrides=list(overrides))
    with open_dict(config):
        config.pop("hydra", None)
    return config


@pytest.fixture(scope="module")
def files() -> dict[str, dict[str, Any]]:
    """What each file declares, by name."""
    with initialize_config_dir(str(schema.CONF)):
        return {name: keys_of(f"+experiment={name}") for name in NAMES}


def keys_of(*arguments: str) -> dict[str, Any]:
    keys: Any = OmegaConf.to_container(compose("config", list(arguments), return_hydra_config=True).hydra.sweeper)
    return {key: value for key, value in keys.items() if key != "_target_"}  # which Hydra keeps


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [(name, size) for name in NAMES for size in SIZES[name]])
def test_every_question_can_be_run_arm_by_arm(name: str, size: str) -> None:
    """`declared` composes every arm, and raises for one that cannot run or is the same as another."""
    with initialize_config_dir(str(schema.CONF)):
        given = typed([f"+experiment={name}", f"size={size}"])
        experiment = declared(name, keys_of(*given.aside), given, composed)
    assert (experiment.name, experiment.size) == (name, size)
    if name not in OF_THE_THESIS:
        return
    assert ("data=cifar10" in experiment.overrides) == (size == "thesis")
    if experiment.analysis in ("pays", "factor", "curves"):
        assert ("epochs=180" in experiment.overrides) == (size == "thesis")


def test_a_question_about_time_has_the_baselines_that_a_reviewer_asks_for(files: dict[str, dict[str, Any]]) -> None:
    about_time = {name: keys for name, keys in files.items() if keys["response"] == "calibrated_train_seconds"}
    assert len(about_time) == 14
    for name, keys in about_time.items():
        assert keys["analysis"] == "pays"
        roles = {arm: node.get("role", "method") for arm, node in keys["arms"].items()}
        counts = Counter(roles.values())
        assert counts["dense"] == 1 and counts["sooner"] >= 2 and counts["narrower"] >= 1, name
        methods = {arm for arm, role in roles.items() if role == "method"}
        shaped = [node["of"] for node in keys["arms"].values() if "of" in node]
        assert methods and len(shaped) == counts["from_scratch"], name
        reshaping = {arm for arm in methods if any(map(RESHAPES, keys["arms"][arm].get("overrides", ())))}
        assert set(shaped) == (reshaping if name in OF_THE_THESIS else SHAPED[name]), name
        curve = [keys["arms"][arm] for arm, role in roles.items() if role in CURVE]
        assert all(set(node) <= {"role", "epochs", "width"} for node in curve), "which differ in nothing else"


def test_a_test_has_five_seeds_or_more(files: dict[str, dict[str, Any]]) -> None:
    assert len(OF_THE_THESIS) == 23
    for name, keys in files.items():
        sizes = {"small", "thesis"} if name in OF_THE_THESIS else {"small", "medium", "full"}
        assert set(keys["sizes"]) == sizes | ({"medium"} if name == "lasso_ratio" else set())
        for size in keys["sizes"].values():
            assert len(size["seeds"]) >= 5 or name in ("blocks_params", "blocks_batch"), "which are exact"


@pytest.mark.parametrize("figure", [f"3.{number}" for number in range(1, 12)])
def test_every_figure_of_the_thesis_is_asked_about(figure: str, files: dict[str, dict[str, Any]]) -> None:
    assert any(figure in keys["thesis"].replace(",", "").partition("Figure")[2].split() for keys in files.values())


@pytest.mark.parametrize("section", ["3.1.2", "3.2.1", "3.2.2", "3.2.3", "3.3", "3.4", "3.5", "3.6.1", "3.6.2"])
def test_every_section_of_the_thesis_is_asked_about(section: str, files: dict[str, dict[str, Any]]) -> None:
    assert any(section in keys["thesis"].replace(",", "").partition("Figure")[0].split() for keys in files.values())


def test_the_recipe_is_its_parts_everywhere(files: dict[str, dict[str, Any]]) -> None:
    """An ablation is of what it takes apart, and nothing is tuned again for other networks and images."""
    recipe, elsewhere = files["recipe"], files["recipe_elsewhere"]
    assert elsewhere["arms"] == recipe["arms"] and elsewhere["margin"] == recipe["margin"]
    whole = recipe["arms"]["recipe"]
    assert set(whole) <= {"parts", "epochs"}
    methods = {name for name, node in recipe["arms"].items() if not ({"role", "parts"} & set(node))}
    assert set(whole["parts"]) <= methods
    for size, keys in recipe["sizes"].items():
        assert not set(keys["overrides"]) >= set(elsewhere["sizes"][size]["overrides"]), "another network"
        assert keys["seeds"] == elsewhere["sizes"][size]["seeds"]


@pytest.mark.parametrize("name", NAMES)
def test_the_arms_of_each_file_are_read(name: str, files: dict[str, dict[str, Any]]) -> None:
    for size in SIZES[name]:
        assert set(_arms(files[name]["arms"], size)) == set(files[name]["arms"])


@pytest.mark.parametrize("size", ["small", "medium", "full", "thesis"])
def test_an_arm_has_the_overrides_of_its_size(size: str) -> None:
    node = {
        "overrides": ["epochs=7"],
        **{other: [f"seed={len(other)}"] for other in ("small", "medium", "full", "thesis")},
    }
    assert sorted(_arms({"a": node}, size)["a"].overrides) == ["epochs=7", f"seed={len(size)}"]


def test_an_arm_has_what_its_parts_have_and_its_own_wins() -> None:
    arms = {
        "a": {"overrides": ["prune=prunetrain", "prune.interval=1"]},
        "b": {"overrides": ["epochs=7"], "small": ["seed=2"]},
        "both": {"parts": ["a", "b"], "overrides": ["prune.interval=3"]},
    }
    found = _arms(arms, "small")["both"].overrides
    assert sorted(found) == ["epochs=7", "prune.interval=3", "prune=prunetrain", "seed=2"]
    assert "seed=2" not in _arms(arms, "full")["both"].overrides
    for part in ("c", "both", "half"):
        wrong = {**arms, "half": {"epochs": 0.5}, "all": {"parts": [part]}}
        with pytest.raises(UserError, match=rf"hydra\.sweeper\.arms\.all\.parts={part}: must be one of a, b: an arm"):
            _arms(wrong, "small")


def test_the_guide_lists_every_question() -> None:
    guide = Path(__file__).parents[1] / "docs" / "guides" / "experiments.md"
    table = [line for line in guide.read_text().splitlines() if line.startswith("| `")]
    assert [name for name in NAMES if not any(f"`{name}`" in line for line in table)] == []


def test_every_number_format_is_asked_about(files: dict[str, dict[str, Any]]) -> None:
    """Whether it costs accuracy: by a margin stated beforehand and, on images that are not nearly solved, ten seeds."""
    question = files["format_accuracy"]
    overrides = [override for node in question["arms"].values() for override in node["overrides"]]
    formats = set(schema.OPTIONS["precision"]) - {"auto", "custom"}
    assert formats <= {override.removeprefix("precision=") for override in overrides}
    assert next(iter(question["arms"].values()))["overrides"] == ["precision=o0"], "the reference"
    assert (question["analysis"], question["response"], question["margin"]) == ("no_worse", "test_accuracy", 0.005)
    assert all(len(question["sizes"][size]["seeds"]) == 10 for size in ("medium", "full"))
