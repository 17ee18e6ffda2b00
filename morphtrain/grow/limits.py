"""How large a network may become."""

from __future__ import annotations

from collections.abc import Mapping

from morphtrain.cost import WidthCost
from morphtrain.grow.size import Cost, params_at
from morphtrain.morph import ChannelGraph, Space
from morphtrain.state import Run


def share_of_limits(run: Run, graph: ChannelGraph, max_params: float | None, max_macs: float | None) -> Cost:
    """A cost by the widths of `graph`: the larger of params and MACs as shares of their limits; up to 1 is allowed.

    Args:
        max_params, max_macs: multiples of what the run's first network had; None: no limit.
    """
    params, flops = params_at(graph), WidthCost(graph, "flops")

    def cost(widths: Mapping[Space, int]) -> float:
        shares = [0.0]
        if max_params is not None:
            shares.append(params(widths) / (max_params * run.initial["params"]))
        if max_macs is not None:
            shares.append(flops(widths) / 2 / (max_macs * run.initial["macs"]))
        return max(shares)

    return cost
