"""An option of a config group: a dataclass that declares the option's keys once, and is found by the option's name.

    @dataclass
    class PruneTrain(Prune, option="prunetrain"):
        lasso_ratio: float  # defaults and explanations are in conf/prune/prunetrain.yaml

        def __post_init__(self) -> None:
            check(0 < self.lasso_ratio < 1, "prune.lasso_ratio", self.lasso_ratio, "between 0 and 1")

It is in its group's module in `morphtrain/schema`, or in a module of its own there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from morphtrain.schema.custom import Custom

# group -> name of an option -> what declares its keys
OPTIONS: dict[str, dict[str, type[Option] | type[Custom]]] = {}


@dataclass
class Option:
    """Base of all options. A group's own base has the keys that all its options share, and is the group's type.

    Class keywords:
        group: on a group's base: the group's name.
        plain: on a group's base: the options without further keys.
        option: on an option: its name, or several names if options share their keys.
    """

    name: str

    group: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ()  # what the option adds to every epoch's record
    epoch_keys: ClassVar[tuple[str, ...]] = ()  # keys that may be shares of the run instead, such as 25%

    def __init_subclass__(
        cls,
        group: str | None = None,
        plain: tuple[str, ...] = (),
        option: str | tuple[str, ...] = (),
    ) -> None:
        if group is not None:
            cls.group = group
            OPTIONS[group] = {}
        names = (option,) if isinstance(option, str) else option
        for name in (*plain, *names):
            OPTIONS[cls.group][name] = cls


def keywords(option: Option) -> dict[str, Any]:
    """The keys that an option does not share with its group: keywords for what it describes, if the names agree."""
    base = next(kind for kind in type(option).__mro__ if "group" in vars(kind))
    shared = {field.name for field in fields(base)}
    return {field.name: getattr(option, field.name) for field in fields(option) if field.name not in shared}


def option_of(node: Mapping[Any, Any]) -> Any:
    """The name of a node's option; the node may be composed, stored, or the `vars` of its dataclass.

    It is in `name`, or in `source` if the option uses `name` for something else. A `_target_` means "custom".
    """
    keys = set(node)  # `in` is False for a key of a composed node whose value is missing
    if "_target_" in keys:
        return "custom"
    return node.get("source" if "source" in keys else "name")


def size_keys(group: str, option: Option | Custom) -> str:
    """The keys of a group that may say how large something is, with their values: `model.blocks=3 model.width=16`.

    Without any, the option.
    """
    given = option.arguments if isinstance(option, Custom) else vars(option)
    sizes = {key: value for key, value in given.items() if _is_size(value)}
    return " ".join(f"{group}.{key}={value}" for key, value in sizes.items()) or f"{group}={option.name}"


def _is_size(value: Any) -> bool:
    if type(value) is list:
        return value != [] and not any(isinstance(one, Custom) for one in value)
    return type(value) is int or (type(value) is float and value > 1)
