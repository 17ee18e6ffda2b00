"""Grow only where the regulariser did not shrink: PruneTrain and Net2Net as MorphNet (sections 2.6 and 3.5)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from morphtrain.grow.expand import expand_to
from morphtrain.grow.net2deeper import insert_block_like, stage_blocks
from morphtrain.grow.size import Cost
from morphtrain.morph import ChannelGraph, Space, Start
from morphtrain.wording import counted

Operator = Literal["wider", "deeper", "auto"]


@dataclass
class Growth:
    """What grew: widths (before, after) by space name, and the paths of new blocks."""

    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.widths or self.blocks)

    def summary(self) -> str:
        """The growth in a few words; "" if nothing grew."""
        added = sum(after - before for before, after in self.widths.values())
        parts = [f"widened {counted(len(self.widths), 'space')} by {counted(added, 'channel')}"] if self.widths else []
        parts += [f"inserted block {path}" for path in self.blocks]
        return ", ".join(parts)


def kept_spaces(graph: ChannelGraph, reference: Mapping[str, int], keep_fraction: float) -> list[Space]:
    """Spaces that still have this fraction of their `reference` width; one without a reference is new and counts."""
    return [s for s in graph.spaces if s.size >= keep_fraction * reference.get(s.name, 0) and not s.is_ambiguous]


def grow_where_kept(
    graph: ChannelGraph,
    reference: Mapping[str, int],
    cost: Callable[[ChannelGraph], Cost],
    target: float,
    *,
    keep_fraction: float = 0.9,
    operator: Operator = "wider",
    start: Start = "zero_gamma",
    calibration: Sequence[Any] = (),
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    optimizer: Optimizer | None = None,
) -> Growth:
    """Grow the parts that kept their channels until the whole network costs `target`; the others are left alone.

    Args:
        reference: the widths, by space name, that "kept" is measured against.
        cost: makes the cost of a graph, for instance `lambda graph: WidthCost(graph, "flops")`.
        operator: "wider" widens the spaces that kept; "deeper" gives every stage whose blocks kept all their spaces a
            new block, as far as the target allows; "auto" does the latter and widens the other spaces that kept.
        start, calibration: for new blocks, see `ChannelGraph.insert_block`.
        noise, generator, optimizer: see `widen`.
    """
    growth = Growth()
    names = {space.name for space in kept_spaces(graph, reference, keep_fraction)}
    deepened: set[str] = set()
    if operator != "wider":
        for path, inside in _whole_stages(graph, names):
            trial = copy.deepcopy(graph)
            insert_block_like(trial, path, [batch[:2] for batch in calibration[:1]], start)
            if cost(trial)({}) <= target:
                growth.blocks.append(insert_block_like(graph, path, calibration, start, optimizer))
                deepened |= inside
    if operator != "deeper" and cost(graph)({}) <= target:
        wide = [space for space in graph.spaces if space.name in names - deepened]
        growth.widths = expand_to(
            graph, cost(graph), target, spaces=wide, noise=noise, generator=generator, optimizer=optimizer
        )
    return growth


def _whole_stages(graph: ChannelGraph, kept: set[str]) -> list[tuple[str, set[str]]]:
    """(path of the end, names of the spaces) of every stage whose blocks all kept their channels."""
    stages = []
    for end in graph.stage_ends:
        blocks = stage_blocks(graph, end)
        names = {space.name for block in blocks for space in (*block.spaces, *block.outputs)}
        if names and names <= kept:
            stages.append((end.path, names))
    return stages
