"""The questions in `conf/experiment`: each composes at both sizes, arm by arm, and all of chapter 3 is asked."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from morphtrain import schema
from morphtrain.evidence.experiment import CURVE, Experiment
from morphtrain.experiment.declaration import declared, typed

NAMES = sorted(path.stem for path in (schema.CONF / "experiment").glob("*.yaml"))
FIGURES = [f"3.{number}" for number in range(1, 12)]
SECTIONS = ["3.1.2", "3.2.1", "3.2.2", "3.2.3", "3.3", "3.4", "3.5", "3.6.1"]


def composed(overrides: Sequence[str]) -> DictConfig:
    config = compose("config", overrides=list(overrides))
    with open_dict(config):
        config.pop("hydra", None)
    return config


@pytest.fixture(scope="module", params=["small", pytest.param("thesis", marks=pytest.mark.slow)])
def experiments(request: pytest.FixtureRequest) -> dict[str, Experiment]:
    """Every experiment by name; `declared` raises for an arm that cannot run or is the same as another."""
    found = {}
    with initialize_config_dir(str(schema.CONF)):
        for name in NAMES:
            given = typed([f"+experiment={name}", f"size={request.param}"])
            keys = compose("config", overrides=list(given.aside), return_hydra_config=True).hydra.sweeper
            found[name] = declared(name, OmegaConf.to_container(keys), given, composed)
    return found


def test_every_question_composes_for_every_arm(experiments: dict[str, Experiment]) -> None:
    assert len(NAMES) == 20
    for name, experiment in experiments.items():
        assert experiment.name == name
        thesis = experiment.size == "thesis"
        assert ("data=cifar10" in experiment.overrides) == thesis
        if experiment.analysis in ("pays", "factor", "curves"):
            assert ("epochs=180" in experiment.overrides) == thesis


def test_a_question_about_time_has_the_baselines_that_a_reviewer_asks_for(
    experiments: dict[str, Experiment],
) -> None:
    about_time = [e for e in experiments.values() if e.response == "calibrated_train_seconds"]
    assert len(about_time) >= 8
    for experiment in about_time:
        assert experiment.analysis == "pays"
        roles = [arm.role for arm in experiment.arms.values()]
        assert roles.count("sooner") >= 2 and roles.count("narrower") >= 2
        shaped = {arm.of for arm in experiment.arms.values()} - {None}
        methods = {name for name, arm in experiment.arms.items() if arm.role == "method"}
        assert methods and shaped == methods, experiment.name
        dense = experiment.arms["dense"]
        assert all(
            "prune" not in o and "grow" not in o
            for a in experiment.arms.values()
            if a.role in CURVE
            for o in a.overrides
        )
        assert dense.overrides == ()


def test_a_test_has_five_seeds_or_more(experiments: dict[str, Experiment]) -> None:
    for name, experiment in experiments.items():
        if name not in ("blocks_params", "blocks_batch"):  # which are exact
            assert len(experiment.seeds) >= 5, name


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_of_the_thesis_is_asked_about(figure: str, experiments: dict[str, Experiment]) -> None:
    words = [e.thesis.replace(",", "").partition("Figure")[2].split() for e in experiments.values()]
    assert any(figure in named for named in words)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_of_the_thesis_is_asked_about(section: str, experiments: dict[str, Experiment]) -> None:
    words = [e.thesis.replace(",", "").partition("Figure")[0].split() for e in experiments.values()]
    assert any(section in named for named in words)
