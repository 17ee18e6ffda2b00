"""MorphNet's second half (Gordon et al. 2018, arXiv 1711.06798, section 3): the widest network that a target allows.

expand_to(graph, WidthCost(graph, "flops"), target=2 * 40e6, optimizer=optimizer)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from morphtrain.grow.net2net import widen
from morphtrain.grow.size import Cost, Widths
from morphtrain.morph import ChannelGraph, MorphError, Space

LARGEST_MULTIPLIER = 2**20


def expand_to(
    graph: ChannelGraph,
    cost: Cost,
    target: float,
    *,
    spaces: Sequence[Space] | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    optimizer: Optimizer | None = None,
) -> dict[str, tuple[int, int]]:
    """Multiply widths by the largest factor that keeps the cost within `target`, without changing the function.

    Widths are rounded down; single channels then fill what is left of the target, where they fit. In at least one space
    none does, so the cost ends less than one channel below the target.

    Args:
        cost: for instance `morphtrain.cost.WidthCost(graph, "flops")`.
        spaces: those to widen; None: all that can be.
        noise, generator, optimizer: see `widen`.

    Returns:
        widths (before, after) by the names of the spaces that became wider.

    Raises:
        MorphError: if the network already costs more than `target`; nothing is changed then.
    """
    chosen = [space for space in (graph.spaces if spaces is None else spaces) if not space.is_ambiguous]
    widths = widest(cost, chosen, target)
    names = {space.name: width for space, width in widths.items()}
    return widen(graph, target=names, noise=noise, generator=generator, optimizer=optimizer)


def widest(cost: Cost, spaces: Sequence[Space], target: float, most: float = LARGEST_MULTIPLIER) -> dict[Space, int]:
    """The largest widths within `target`: one multiplier, at most `most`, for all spaces, then single channels."""
    present = {space: space.size for space in spaces}
    if cost(present) > target:
        raise MorphError(f"the network already costs {cost(present):.6g}, more than the target of {target:.6g}")

    def at(multiplier: float) -> dict[Space, int]:
        return {space: int(multiplier * size) for space, size in present.items()}

    low, high = 1.0, 2.0
    while high < most and cost(at(high)) <= target:
        low, high = high, 2 * high
    high = min(high, most)
    if not spaces or cost(at(high)) <= target:
        return at(high)
    while high - low > 1e-9 * high:  # finer than 1 / size: exact in whole channels
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= target else (low, middle)
    return _filled(cost, at(low), target, multiplier=low, present=present)


def _filled(
    cost: Cost, widths: dict[Space, int], target: float, multiplier: float, present: Widths
) -> dict[Space, int]:
    """Add a channel to every space where one fits, first where rounding down took the most."""
    for space in sorted(widths, key=lambda space: widths[space] - multiplier * present[space]):
        wider = {**widths, space: widths[space] + 1}
        if cost(wider) <= target:
            widths = wider
    return widths
