"""Tables of rules for functions and tensor methods, by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from morphtrain.morph.trace.labelled import LabelledGraph

Rule = Callable[[LabelledGraph, fx.Node, Any], Any]  # (graph, call, its value) -> labels of the value


def by_name(rule: Rule, names: str) -> dict[str, Rule]:
    """The same rule under several names, separated by spaces."""
    return dict.fromkeys(names.split(), rule)
