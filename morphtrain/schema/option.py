"""An option of a config group: a dataclass that declares the option's keys once, and is found by the option's name.

    @dataclass
    class PruneTrain(Prune, option="prunetrain"):
        lasso_ratio: float  # defaults and explanations are in conf/prune/prunetrain.yaml

        def __post_init__(self) -> None:
            check(0 < self.lasso_ratio < 1, "prune.lasso_ratio", self.lasso_ratio, "between 0 and 1")

It stands in its group's module in `morphtrain/schema`, or in a file of its own beside it.
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
    """Base of all options. A group's own base has the keys that all of its options have; it types the group.

    Class keywords:
        group: of a group's base: the group's name.
        plain: of a group's base: its options without further keys.
        option: of an option: its name, or several if options share their keys.
    """

    name: str

    group: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ()  # what the option adds to every epoch's record

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
    """All keys of an option except its name: the keywords of what it describes, where that calls them alike."""
    return {field.name: getattr(option, field.name) for field in fields(option) if field.name != "name"}


def option_of(node: Mapping[Any, Any]) -> Any:
    """Which option of its group a node is, be it composed, stored, or the `vars` of its dataclass.

    The option's own name is in `name`, unless that is taken: then in `source`. A `_target_` makes it the user's own.
    """
    keys = set(node)  # `in` would deny keys of a composed node whose value is still missing
    if "_target_" in keys:
        return "custom"
    return node.get("source" if "source" in keys else "name")
