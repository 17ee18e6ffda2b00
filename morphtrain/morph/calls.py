"""The calls of a network's layers as a trace saw them: what a layer works on, which its tensors do not tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

SAMPLES = 2  # what a trace runs on


class Call(NamedTuple):
    """A layer called once. The shapes are of `SAMPLES` samples, with the channels there were when it was traced."""

    path: str
    input_shape: torch.Size
    output_shape: torch.Size


def layer_calls(nodes: Sequence[fx.Node]) -> list[Call]:
    """Every call of a module with one tensor that gives one tensor, in the order of execution."""
    calls = []
    for n in nodes:
        inputs = [a for a in n.all_input_nodes if "shape" in a.meta]
        if n.op == "call_module" and len(inputs) == 1 and "shape" in n.meta:
            calls.append(Call(str(n.target), inputs[0].meta["shape"], n.meta["shape"]))
    return calls
