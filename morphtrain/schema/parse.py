"""From a composed Hydra config, or a checkpoint's plain data, to the typed config."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from morphtrain.errors import UserError, first_line
from morphtrain.plain_data import mismatch
from morphtrain.schema.checks import check, check_one_of
from morphtrain.schema.config import Config, TopLevel
from morphtrain.schema.custom import Custom
from morphtrain.schema.data import Curriculum, CustomData
from morphtrain.schema.files import CONF
from morphtrain.schema.max_batch import MaxBatch, MaxBatchKeys
from morphtrain.schema.model import CustomModel, Weights
from morphtrain.schema.names import no_such_key
from morphtrain.schema.option import OPTIONS, Option, option_of
from morphtrain.schema.shares import in_epochs
from morphtrain.schema.sweeper import Sweeper
from morphtrain.schema.tracking import Tracking
from morphtrain.wording import as_yaml, nearest

IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
EXAMPLES = {int: "1,2", float: "0.5,0.9", str: "name,other"}  # of what a list holds
FURTHER_METHOD = "morphtrain.options.method"  # one of the options as a further method
SHARED: dict[type, type] = {CustomData: Curriculum, CustomModel: Weights}  # keys of a user's own part that are not its


def compose(*overrides: str, config_dir: str | Path | None = None) -> Config:
    """See `morphtrain.compose`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    own = [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"]
    around = GlobalHydra.instance().hydra  # of an application of Hydra's that calls this
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF)):
            return parse(hydra_compose("config", overrides=[*own, *overrides]))
    finally:
        GlobalHydra.instance().hydra = around


def check_sweeper(values: Mapping[str, Any]) -> None:
    """Raise a `UserError` for a value of the sweeper's keys that has a wrong type or range."""
    node = OmegaConf.create({field.name: values[field.name] for field in fields(Sweeper)})
    _typed(Sweeper, node, "hydra.sweeper")


def typed(kind: type, values: Mapping[str, Any], at: str) -> Any:
    """An instance of dataclass `kind`, whose keys are below `at`; raises `UserError` for a wrong type or range."""
    return _typed(kind, OmegaConf.create(dict(values)), at)


def own_directories(runtime: Any) -> list[Path]:
    """The directories of option files that the user's command names; `runtime` is Hydra's `hydra.runtime`."""
    return [Path(source.path) for source in runtime.config_sources if source.provider == "command-line"]


def parse(composed: DictConfig) -> Config:
    """The typed config of a composed one; raises `UserError` for an unknown key, a wrong type or range."""
    config: Config = _parse(Config, TopLevel, composed)
    return config


def parse_max_batch(composed: DictConfig) -> MaxBatch:
    """The same for `conf/maxbatch.yaml`."""
    config: MaxBatch = _parse(MaxBatch, MaxBatchKeys, composed)
    return config


def stored_option(group: str, stored: Mapping[str, Any]) -> Option | Custom:
    """The dataclass of a group's option from a checkpoint's plain data; raises `UserError` for what is none."""
    name = option_of(stored)
    check_one_of(f"{group}.name", name, tuple(OPTIONS[group]))
    kind = OPTIONS[group][name]
    hints = get_type_hints(kind)
    types = {field.name: hints[field.name] for field in fields(kind)}
    if found := mismatch(stored, types, group):
        raise UserError(found)
    if unknown := stored.keys() - types.keys():
        raise UserError(f"{group}.{min(unknown)}: no such key")
    option: Option | Custom = kind(**stored)
    if isinstance(option, Custom):
        option.check(group)
    return option


def _parse(kind: Any, keys: type, composed: DictConfig) -> Any:
    """An instance of dataclass `kind`: its groups, and the fields of `keys`."""
    names = [field.name for field in fields(kind)]
    for name in names:
        if name not in composed:
            raise UserError(f"{name}: missing; give it a value")
    for key in map(str, composed):
        if key not in names:
            raise UserError(f"{key}={composed[key]}: no such key; {nearest(key, names)}")
    top = {name: composed[name] for name in names if name not in OPTIONS and name != "methods"}
    plain = _typed(keys, OmegaConf.create(top), "")
    epochs = getattr(plain, "epochs", None)
    values: dict[str, Any] = {name: _option(name, composed[name], epochs) for name in names if name in OPTIONS}
    if "methods" in names:
        values["methods"] = _methods(composed["methods"], epochs)
    return kind(**vars(plain), **values)


def _option(group: str, node: Any, epochs: int | None) -> Option | Custom:
    name = option_of(node) if isinstance(node, DictConfig) else node
    if name is None:
        raise UserError(f"{group}: has neither a name nor a _target_; an option file of your own needs a _target_")
    at = "source" if isinstance(node, DictConfig) and "source" in set(node) else "name"
    check_one_of(f"{group}.{at}", name, tuple(OPTIONS[group]))
    kind = OPTIONS[group][name]
    if epochs is not None and isinstance(node, DictConfig):
        values: Any = OmegaConf.to_container(node, resolve=False)
        if shares := in_epochs(kind, values, epochs, group):
            node = OmegaConf.merge(node, shares)
    option: Option | Custom = _custom(node, group, kind) if issubclass(kind, Custom) else _typed(kind, node, group)
    if isinstance(option, Tracking):
        option.also = _further_trackers(option)
    elif group == "tracking" and isinstance(option, Custom) and "also" in option.arguments:
        given = as_yaml(option.arguments["also"])
        works = f"tracking=none 'tracking.also=[{{_target_: {option._target_}}},csv]'"
        raise UserError(f"tracking.also={given}: there is none beside a tracker of your own; {works} has several")
    return option


def _further_trackers(tracking: Tracking) -> list[Option | Custom]:
    """The options that `tracking.also` stands for: by their names, with keys, or a user's own by their `_target_`."""
    given = tracking.also
    if not isinstance(given, list):
        raise UserError(f"tracking.also={as_yaml(given)}: must be a list, as [tensorboard,csv]")
    found = [_further_tracker(entry, f"tracking.also[{number}]") for number, entry in enumerate(given)]
    names = [tracking.name, *(option.name for option in found)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"tracking.also={given}: {twice[0]} would track the run twice; each tracker once")
    return found


def _further_tracker(entry: Any, at: str) -> Option | Custom:
    node = entry if isinstance(entry, dict) else {"name": entry}
    if "_target_" in node:
        return _custom(OmegaConf.create(node), at)
    known = [name for name in OPTIONS["tracking"] if name not in ("none", "mlflow", "custom")]
    name = node.get("name")
    if name not in known or "also" in node:
        wanted = f"{', '.join(known)}, or a node with a _target_; MLflow is tracking=mlflow itself"
        raise UserError(f"{at}={entry}: must be one of {wanted}")
    defaults: Any = OmegaConf.to_container(OmegaConf.load(CONF / "tracking" / f"{name}.yaml"))
    further: Option = typed(OPTIONS["tracking"][name], {**defaults, **node}, at)
    return further


def _methods(nodes: Any, epochs: int | None) -> list[Custom]:
    """`methods`: nodes with a `_target_` each."""
    if not isinstance(nodes, ListConfig):
        raise UserError(f"methods={nodes}: must be a list, as methods=[{{_target_: my_package.Method}}]")
    for number, node in enumerate(nodes):
        if not isinstance(node, DictConfig) or "_target_" not in set(node):
            raise UserError(f"methods[{number}]={node}: must have a _target_, as {{_target_: my_package.Method}}")
    return [_method(node, f"methods[{number}]", epochs) for number, node in enumerate(nodes)]


def _method(node: DictConfig, at: str, epochs: int | None) -> Custom:
    custom = _custom(node, at)
    group, _, name = str(custom.arguments.get("option")).partition("/")
    kind = OPTIONS.get(group, {}).get(name)
    if custom._target_ != FURTHER_METHOD or kind is None or epochs is None:
        return custom
    return replace(custom, arguments={**custom.arguments, **in_epochs(kind, custom.arguments, epochs, at)})


def _custom(node: DictConfig, at: str, kind: type[Custom] = Custom) -> Custom:
    """A user's own part: all keys but `_target_` and those of `kind` are keywords of the call, in plain containers."""
    for key in ("_target_", *node):
        if key not in node:
            raise UserError(f"{at}.{key}: missing; give it a value")
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {first_line(error)}") from error
    assert isinstance(plain, dict)
    target = str(plain.pop("_target_"))
    shared = _shared(SHARED[kind], plain, at) if kind in SHARED else {}
    custom = kind(target, plain, **shared)  # type: ignore[arg-type]  # `check` looks at the keys
    custom.check(at)
    return custom


def _shared(keys: type, plain: dict[Any, Any], at: str) -> dict[str, Any]:
    """Takes the keys that all options of a group have, those of dataclass `keys`, out of those of the user's own."""
    taken = {field.name: plain.pop(field.name, field.default) for field in fields(keys)}
    return vars(_typed(keys, OmegaConf.create(taken), at))


def _typed(kind: type, node: Any, group: str) -> Any:
    """An instance of dataclass `kind`, its fields converted from `node` by OmegaConf's rules.

    Fields with a default may be left out, as own option files do which are older than the key.
    """
    prefix = f"{group}." if group else ""
    if not isinstance(node, DictConfig):
        raise UserError(f"{group}={node}: must be the name of an option")
    names = [field.name for field in fields(kind)]
    for key in map(str, node):
        if key not in names:
            raise UserError(no_such_key(f"{prefix}{key}", str(node[key])))
    needed = {field.name for field in fields(kind) if field.default is field.default_factory is MISSING}
    for name in names:
        if OmegaConf.is_missing(node, name) or (name in needed and name not in node):
            raise UserError(f"{prefix}{name}: missing; give it a value")
    hints = get_type_hints(kind)
    for name in filter(node.__contains__, names):
        _check_type(kind, node, name, f"{prefix}{name}", hints[name])
    return OmegaConf.to_object(OmegaConf.merge(_structured(kind), node))


@functools.cache  # making one takes longer than all that is done with it; nothing changes it
def _structured(kind: type) -> DictConfig:
    found: DictConfig = OmegaConf.structured(kind)
    return found


def _check_type(kind: type, node: DictConfig, name: str, path: str, hint: Any) -> None:
    """Raise a `UserError` naming `path` unless field `name` of `kind` takes the value in `node`; numbers are finite."""
    try:
        value = node[name]
        if isinstance(value, (DictConfig, ListConfig)):
            value = OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    wanted, kinds = _in_words(hint), get_args(hint) or (hint,)
    if name in getattr(kind, "epoch_keys", ()):
        wanted += " or [25%]" if get_origin(hint) is list else ", or a share of the run, as 25%"
    try:
        typed = OmegaConf.select(OmegaConf.merge(_structured(kind), {name: value}), name)
    except (OmegaConfBaseException, TypeError, ArithmeticError) as error:
        raise UserError(f"{path}={as_yaml(value)}: must be {wanted}") from error
    if bool in kinds:  # to OmegaConf any other number is true
        check(type(value) is not int and type(value) is not float, path, value, wanted)
    numbers = typed if isinstance(typed, ListConfig) else [typed]
    small = all(type(n) is not int or abs(n) < 2**63 for n in numbers)
    check(small, path, f"{value}"[:20] + "...", "a number below 2^63")
    if float in kinds:
        check(all(n is None or math.isfinite(n) for n in numbers), path, value, f"{wanted}, and finite")


def _in_words(hint: Any) -> str:
    """A field's type as a user would say it."""
    parts = get_args(hint)
    if get_origin(hint) is list:
        return f"a list, as [{EXAMPLES[parts[0]]}]"
    if get_origin(hint) is dict:
        return "keys with values, as {key: value}"
    if NoneType in parts:
        return f"{_in_words(next(part for part in parts if part is not NoneType))}, or null"
    return IN_WORDS.get(hint, str(hint))
