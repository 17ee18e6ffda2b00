"""The value of `data.transforms`: what is named there, each with the keywords that make it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from morphtrain.schema.checks import check
from morphtrain.schema.custom import Custom

PACKAGE = "torchvision.transforms.v2"  # of names without a dot


def transforms_of(key: str, value: Any) -> list[Custom]:
    """The transforms of a list of names and nodes, which may be checked already.

    Raises:
        UserError: naming config key `key`, if it is no such list.
    """
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    check(listed, key, value, "a list, as [RandAugment, {_target_: RandomErasing, p: 0.2}]")
    return [transform_of(f"{key}[{number}]", one) for number, one in enumerate(value)]


def transform_of(key: str, value: Any) -> Custom:
    """One of them: a name, or a node with the name as `_target_` and keywords."""
    if isinstance(value, Custom):
        return value
    node = {"_target_": value} if isinstance(value, str) else value
    named = isinstance(node, dict) and isinstance(node.get("_target_"), str)
    check(named, key, value, f"the name of a class of {PACKAGE}, or a node with one, as {{_target_: RandAugment}}")
    target, keywords = node["_target_"], {name: one for name, one in node.items() if name != "_target_"}
    transform = Custom(target if "." in target else f"{PACKAGE}.{target}", keywords)
    transform.check(key)
    return transform
