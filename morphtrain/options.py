"""From the chosen option of a config group to the part of a run that it describes (see `morphtrain.contracts`)."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.optim import Optimizer

from morphtrain import custom
from morphtrain.contracts import Data, Precision
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.schema import Custom, Option, option_of
from morphtrain.tracker import Tracker

# The type that a user's own part of each group must have; None: any function.
KINDS: dict[str, type | None] = {
    "model": nn.Module,
    "data": Data,
    "precision": Precision,
    "optimizer": Optimizer,
    "loss": None,
    "schedule": None,
    "prune": Method,
    "grow": Method,
    "methods": Method,
    "batch_policy": Method,
    "tracking": Tracker,
}


def build(group: str, config: Option | Custom, **given: Any) -> Any:
    """Build what an option of `group` describes; `given` are the group's keywords (`morphtrain.contracts`).

    Raises:
        UserError: if the option cannot be built here, or a user's own part has the wrong type.
    """
    if isinstance(config, Custom):
        return build_custom(group, group, config, **given)
    module = importlib.import_module(f"morphtrain.{group}.{option_of(vars(config))}")
    return module.build(config, **given)


def build_custom(group: str, key: str, config: Custom, **given: Any) -> Any:
    """Build a user's own part; `key` is the config key of its node, for messages."""
    make = custom.find(key, config._target_)
    name = f"{key}._target_={config._target_}"
    if group == "norm":  # applied, not made
        returned = custom.construct(key, make, config, given)
        if returned is not None and returned is not given["model"]:
            raise UserError(f"{name}: returns a {type(returned).__name__}; it has to change the model in place")
        return None
    if group == "optimizer":
        given["params"] = [parameter for parameter in given["model"].parameters() if parameter.requires_grad]
    part = custom.construct(key, make, config, given)
    check_kind(group, key, config, part)
    return part


def check_kind(group: str, key: str, config: Custom, part: Any) -> None:
    """Raise a `UserError` naming `key` unless `part` is what the group's contract asks for."""
    kind, made = KINDS[group], type(part).__name__
    if kind is None and not callable(part):
        raise UserError(f"{key}._target_={config._target_}: makes a {made}, not a function (morphtrain.contracts)")
    if kind is not None and not isinstance(part, kind):
        wanted = "torch.nn.Module" if kind is nn.Module else f"{kind.__module__}.{kind.__name__}"
        raise UserError(f"{key}._target_={config._target_}: makes a {made}, not a {wanted}{_lacking(kind, part)}")


def _lacking(kind: type, part: Any) -> str:
    """A hint: the members of a protocol that a part lacks."""
    if kind not in (Data, Precision):
        return ""
    names = [name for name in (*kind.__annotations__, *vars(kind)) if not name.startswith("_")]
    return f"; it lacks {', '.join(name for name in names if not hasattr(part, name))}"
