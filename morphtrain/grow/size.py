"""How large a network would be with other widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from morphtrain.byte_sizes import readable
from morphtrain.errors import UserError
from morphtrain.memory_limit import machine_bytes
from morphtrain.morph import ChannelGraph, Space
from morphtrain.morph.computation import has_dim
from morphtrain.morph.effective import effective, parameters_of

Widths = Mapping[Space, int]
Cost = Callable[[Widths], float]  # of the network with these widths; spaces not named keep theirs
BYTES = 4  # of a parameter


def params_at(graph: ChannelGraph) -> Cost:
    """The number of parameters as a cost: what `morphtrain.cost.count_params` would count at these widths."""
    shapes = {id(p): list(p.shape) for p in graph.model.parameters()}
    sides = [
        (id(parameter), dim, axis)
        for axis in graph.axes
        for name, dim in axis.tensors
        for parameter in parameters_of(axis.module, name)
        if has_dim(parameter, effective(axis.module, name), dim)
    ]

    def cost(widths: Widths) -> float:
        resized = {key: list(shape) for key, shape in shapes.items()}
        for key, dim, axis in sides:
            resized[key][dim] = axis.length_at(widths)
        return float(sum(map(math.prod, resized.values())))

    return cost


def check_memory(graph: ChannelGraph, widths: Widths, key: str = "grow") -> None:
    """Raise a `UserError`, naming config key `key`, for widths with more parameters than the machine has memory."""
    params = params_at(graph)(widths)
    if params * BYTES > machine_bytes():
        size, memory = readable(params * BYTES), readable(machine_bytes())
        raise UserError(
            f"{key}: {params:.3g} parameters would take {size}, and this machine has {memory}; grow less, or set limits"
        )
