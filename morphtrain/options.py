"""From the chosen option of a config group to the part of a run that it describes (see `morphtrain.contracts`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from morphtrain import custom, schema
from morphtrain.contracts import Data, NormStart, Precision
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.preprocessing import Preprocessing
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
    "gradient": Method,
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
    return _module(group, config).build(config, **given)


def build_method(group: str, config: Option | Custom) -> Method | None:
    """The method that an option is, or that the module of another one makes beside its part: by its `build_method`."""
    if KINDS[group] is Method:
        made: Method | None = build(group, config)
        return made
    make = None if isinstance(config, Custom) else getattr(_module(group, config), "build_method", None)
    return None if make is None else make(config)


def _module(group: str, config: Option) -> Any:
    return importlib.import_module(f"morphtrain.{group}.{option_of(vars(config))}")


def published_weights(config: Option | Custom) -> tuple[Path, dict[str, Tensor], Preprocessing] | None:
    """The file, the tensors and the images of `model.weights`, if that is a name that the option's source publishes."""
    find = None if isinstance(config, Custom) else getattr(_module("model", config), "published", None)
    return None if find is None else find(config)


def norm_start(config: Option | Custom) -> NormStart | None:
    """What an option of the group `norm` does with images before the first step of a run; None if it does nothing."""
    start: NormStart | None = None if isinstance(config, Custom) else getattr(_module("norm", config), "start", None)
    return start


def build_custom(group: str, key: str, config: Custom, **given: Any) -> Any:
    """Build a user's own part; `key` is the config key of its node, for messages."""
    make = custom.find(key, config._target_)
    name = f"{key}._target_={config._target_}"
    check_maker(group, key, config, make)
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


def check_maker(group: str, key: str, config: Custom, make: Callable[..., Any]) -> None:
    """Raise a `UserError` naming `key` if it can be seen, without calling it, that `make` makes no part of `group`.

    A class has to be what the contract asks for. A function has to say so too if it says what it returns; one that does
    not is called, and `check_kind` looks at the result.
    """
    made = make if isinstance(make, type) else custom.annotated(make)
    if group == "norm":
        if made is make:
            raise UserError(f"{key}._target_={config._target_}: is a class; a function of the model is needed")
    elif made is not None and not _may_be(KINDS[group], made):
        raise _unfit(group, key, config, made.__name__, made)


def check_kind(group: str, key: str, config: Custom, part: Any) -> None:
    """Raise a `UserError` naming `key` unless `part` is what the group's contract asks for."""
    kind = KINDS[group]
    if not (callable(part) if kind is None else isinstance(part, kind)):
        raise _unfit(group, key, config, type(part).__name__, part)


def _unfit(group: str, key: str, config: Custom, made: str, part: Any) -> UserError:
    kind = KINDS[group]
    if kind is None:
        wanted = f"function; it is called to make the {group} (morphtrain.contracts)"
    else:
        wanted = "torch.nn.Module" if kind is nn.Module else f"{kind.__module__}.{kind.__name__}{_lacking(kind, part)}"
    return UserError(f"{key}._target_={config._target_}: makes a {made}, not a {wanted}")


def _may_be(kind: type | None, made: type) -> bool:
    """Whether what is said to be a `made` may be what a contract asks for."""
    if kind is None:
        return issubclass(made, Callable) or made is object  # type: ignore[arg-type]
    if kind in (Data, Precision):  # attributes may be set when it is made
        methods = [name for name, member in vars(kind).items() if isinstance(member, FunctionType)]
        own = [name for name in methods if not name.startswith("_")]
        return made is object or hasattr(made, "__getattr__") or all(hasattr(made, name) for name in own)
    return issubclass(made, kind) or issubclass(kind, made)


def _lacking(kind: type, part: Any) -> str:
    """A hint: the members of a protocol that a part lacks."""
    if kind not in (Data, Precision):
        return ""
    names = [name for name in (*kind.__annotations__, *vars(kind)) if not name.startswith("_")]
    return f"; it lacks {', '.join(name for name in names if not hasattr(part, name))}"


def method(option: str, **keys: Any) -> Method:
    """One of MorphTrain's own methods as a further one of a run, beside those of its groups.

    methods=[{_target_: morphtrain.options.method, option: grow/deeper, at_epochs: [8]}]

    Args:
        option: group and name, such as grow/deeper.
        keys: of the option, where they differ from its file in `conf`.

    Raises:
        UserError: if there is no such option, or a key has a wrong type or range.
    """
    group, _, name = option.partition("/")
    schema.check_one_of("option", group, ("prune", "grow", "gradient", "batch_policy"))
    schema.check_one_of("option", name, tuple(known for known in schema.OPTIONS[group] if known != "custom"))
    defaults: Any = OmegaConf.to_container(OmegaConf.load(schema.CONF / group / f"{name}.yaml"))
    config = schema.typed(schema.OPTIONS[group][name], {**defaults, **keys}, f"methods, option {option}")
    made: Method = build(group, config)
    return made
