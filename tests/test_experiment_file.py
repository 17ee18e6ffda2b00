"""The declaration of an experiment, as it is in its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from morphtrain.errors import UserError
from morphtrain.evidence import experiment
from morphtrain.evidence.experiment import Arm, Experiment

DECLARED = Experiment(
    name="pays",
    size="small",
    question="Does it pay?",
    thesis="3.2.1",
    analysis="pays",
    response="calibrated_train_seconds",
    arms={
        "dense": Arm(role="dense"),
        "sooner": Arm(("epochs=3",), role="sooner"),
        "pruned": Arm(("prune=prunetrain", "model.width=${x}")),
        "scratch": Arm(role="from_scratch", of="pruned"),
    },
    seeds=(1, 2),
    margin=0.01,
    overrides=("epochs=6",),
)


def written(plain: Any, directory: Path) -> Path:
    (directory / experiment.FILE).write_text(yaml.safe_dump(plain, sort_keys=False))
    return directory


def test_a_declaration_is_read_as_it_was_written(tmp_path: Path) -> None:
    loaded = experiment.load(written(experiment.as_plain(DECLARED), tmp_path))
    assert loaded == DECLARED
    assert list(loaded.arms) == list(DECLARED.arms)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": "It pays."}, "question=It pays.: must be one sentence that ends in a question mark"),
        ({"analysis": "guess"}, "analysis=guess: must be one of pays, ratio, no_worse, factor, line, curves"),
        ({"seeds": []}, "seeds=[]: must be a list of at least one seed"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: must be different seeds"),
        ({"seeds": "many"}, "the declaration.seeds is a str, not list"),
        ({"margin": 0.0}, "margin=0.0: must be above 0"),
        ({"typo": 1}, "the declaration.typo: no such key"),
        ({"arms": {"dense": {"overrides": [], "role": "dense", "of": None}}}, "must be two or more arms"),
        ({"analysis": "line"}, "x=null: must be the config's key or the metric on the x axis"),
        ({"analysis": "no_worse"}, "response=calibrated_train_seconds: must be an accuracy or a loss"),
    ],
)
def test_what_is_no_declaration_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    written({**experiment.as_plain(DECLARED), **change}, tmp_path)
    with pytest.raises(UserError) as raised:
        experiment.load(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / experiment.FILE}: ")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ({"role": "king"}, "arms.new.role=king: must be one of method, dense"),
        ({"role": "from_scratch"}, "arms.new.of=null: must be an arm for role=from_scratch"),
        ({"of": "pruned"}, "arms.new.of=pruned: must be an arm for role=from_scratch, null for others"),
        ({"role": "from_scratch", "of": "dense"}, "arms.new.of=dense: must be the name of a method's arm"),
        ({"overrides": "epochs=3"}, "arms.new.overrides is a str"),
    ],
)
def test_an_arm_that_cannot_run_is_named(arm: dict[str, Any], said: str, tmp_path: Path) -> None:
    plain = experiment.as_plain(DECLARED)
    plain["arms"]["new"] = {"overrides": [], "role": "method", "of": None, **arm}
    with pytest.raises(UserError) as raised:
        experiment.load(written(plain, tmp_path))
    assert said in str(raised.value)


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "\x00", "arms: !!python/object/apply:os.system [true]"])
def test_any_other_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / experiment.FILE).write_text(text)
    with pytest.raises(UserError, match=r"experiment\.yaml: "):
        experiment.load(tmp_path)


def test_a_claim_that_a_method_pays_needs_the_dense_curve() -> None:
    plain = experiment.as_plain(DECLARED)
    del plain["arms"]["sooner"]
    with pytest.raises(UserError, match="role sooner"):
        experiment.from_plain(plain)
