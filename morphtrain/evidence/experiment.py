"""An experiment as it was declared before its first run: question, arms, seeds, and how the answer is decided."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from morphtrain.errors import UserError, first_line
from morphtrain.plain_data import mismatch
from morphtrain.wording import as_yaml

FILE = "experiment.yaml"
ANALYSES = ("pays", "ratio", "no_worse", "factor", "line", "curves")
CURVE = ("dense", "sooner", "narrower")  # roles of the points of the dense curve
ROLES = ("method", *CURVE, "from_scratch")
NAME = re.compile(r"\w[\w.+-]*")  # of an arm, which is that of its directories, too

ARM = {"overrides": list[str], "role": str, "of": str | None}  # the keys of an arm in the file, and their types
EXPERIMENT = {
    **dict.fromkeys(("name", "size", "question", "thesis", "analysis", "response", "claim", "limits"), str),
    "arms": dict[str, dict],
    "seeds": list[int],
    "margin": float,
    "x": str | None,
    "y": str | None,
    "inverse": bool,
    "overrides": list[str],
}


@dataclass(frozen=True)
class Arm:
    """One of the configurations that an experiment compares.

    Args:
        overrides: what it is run with, beside the experiment's own overrides and the seed.
        role: method | dense | sooner | narrower | from_scratch.
        of: for from_scratch, the arm whose final structure it trains from fresh weights, for that arm's seconds.
    """

    overrides: tuple[str, ...] = ()
    role: str = "method"
    of: str | None = None


@dataclass(frozen=True)
class Experiment:
    """A question, and everything about its answer that has to be settled before anything runs.

    Args:
        name: of the file in `conf/experiment`.
        size: small | thesis.
        question: one sentence.
        thesis: which sections, figures and tables of the thesis's chapter 3 it answers; "" if none.
        analysis: pays | ratio | no_worse | factor | line | curves.
        response: the metric of the last record that decides, such as calibrated_train_seconds.
        arms: by name, in order; the first is the reference.
        seeds: of which each arm has one run.
        margin: the least difference that would matter: of accuracy (0 to 1), or of time as ratio - 1.
        x: for a line or a factor, the config's key or the metric on the x axis.
        y: for a line, the metric on the y axis; None: the response.
        inverse: whether the line is that of 1 / y.
        overrides: of all arms: those of the size and those that were typed.
        claim: what the thesis says, in a sentence; "" if nothing.
        limits: what this size or this machine cannot show; "" if nothing.

    Raises:
        UserError: naming the key, for what is no declaration.
    """

    name: str
    size: str
    question: str
    thesis: str
    analysis: str
    response: str
    arms: Mapping[str, Arm]
    seeds: tuple[int, ...]
    margin: float
    x: str | None = None
    y: str | None = None
    inverse: bool = False
    overrides: tuple[str, ...] = ()
    claim: str = ""
    limits: str = ""

    def __post_init__(self) -> None:
        _check(self.question.endswith("?"), "question", self.question, "one sentence that ends in a question mark")
        _check(self.analysis in ANALYSES, "analysis", self.analysis, "one of " + ", ".join(ANALYSES))
        _check(self.margin > 0, "margin", self.margin, "above 0: the least difference that would matter")
        _check(len(self.seeds) > 0, "seeds", list(self.seeds), "a list of at least one seed")
        _check(len(set(self.seeds)) == len(self.seeds), "seeds", list(self.seeds), "different seeds")
        _check(len(self.arms) > 1, "arms", list(self.arms), "two or more arms, by name")
        for name, arm in self.arms.items():
            _check(NAME.fullmatch(name) is not None, "arms", name, "names of letters, digits, _, ., + and -")
            _check(arm.role in ROLES, f"arms.{name}.role", arm.role, "one of " + ", ".join(ROLES))
            fits = (arm.of is not None) == (arm.role == "from_scratch")
            _check(fits, f"arms.{name}.of", arm.of, "an arm for role=from_scratch, null for others")
            _check(arm.of is None or arm.of in self._methods(), f"arms.{name}.of", arm.of, "the name of a method's arm")
        if self.analysis == "line":
            _check(self.x is not None, "x", None, "the config's key or the metric on the x axis")
        if self.analysis == "no_worse":
            fits = self.response.endswith(("accuracy", "loss")) and not self.response.endswith("time_to_accuracy")
            _check(fits, "response", self.response, "an accuracy or a loss, as test_accuracy, for analysis=no_worse")
        if self.analysis == "pays":
            roles = {arm.role for arm in self.arms.values()}
            _check(next(iter(self.arms.values())).role == "dense", "arms", list(self.arms), "with the dense arm first")
            _check("sooner" in roles, "arms", list(self.arms), "with at least one of role sooner, for the dense curve")

    def _methods(self) -> list[str]:
        return [name for name, arm in self.arms.items() if arm.role == "method"]


def load(directory: str | Path) -> Experiment:
    """The experiment whose runs are in `directory`, which holds its experiment.yaml.

    Raises:
        OSError: if there is no such file.
        UserError: naming the file, if it is no declaration.
    """
    from omegaconf import OmegaConf

    path = Path(directory, FILE)
    text = path.read_bytes()
    try:
        return from_plain(OmegaConf.to_container(OmegaConf.load(io.BytesIO(text)), resolve=False))
    except Exception as error:  # YAML's parsers raise too many kinds to name
        raise UserError(f"{path}: {first_line(error)}") from error


def from_plain(plain: Any) -> Experiment:
    """An experiment from plain data, as it is in its file: `as_plain` undone.

    Raises:
        UserError: naming the key, for a missing, unknown or wrong one.
    """
    _check_keys(plain, EXPERIMENT, "the declaration")
    for name, arm in plain["arms"].items():
        _check_keys(arm, ARM, f"arms.{name}")
    arms = {name: Arm(**{**arm, "overrides": tuple(arm["overrides"])}) for name, arm in plain["arms"].items()}
    lists = {key: tuple(plain[key]) for key in ("seeds", "overrides")}
    return Experiment(**{**plain, **lists, "arms": arms})


def as_plain(experiment: Experiment) -> dict[str, Any]:
    """An experiment as dicts, lists, numbers and text."""
    plain = asdict(experiment)
    for part in (plain, *plain["arms"].values()):
        part["overrides"] = list(part["overrides"])
    return {**plain, "seeds": list(experiment.seeds)}


def _check_keys(plain: Any, kinds: dict[str, Any], name: str) -> None:
    if found := mismatch(plain, kinds, name):
        raise UserError(found)
    if unknown := sorted(plain.keys() - kinds.keys()):
        raise UserError(f"{name}.{unknown[0]}: no such key; there are {', '.join(kinds)}")


def _check(ok: bool, key: str, value: object, wanted: str) -> None:
    if not ok:
        raise UserError(f"{key}={as_yaml(value)}: must be {wanted}")
