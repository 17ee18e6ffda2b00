"""From dead channels to a smaller network: channel union or gating, block removal, rounding (Lym et al. 2019, 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain.morph import Block, ChannelGraph, Gate, Space
from morphtrain.prune.bias_folding import constant_output
from morphtrain.prune.rounding import NO_ROUNDING, Rounding
from morphtrain.wording import counted

ImportanceOf = Callable[[ChannelGraph], dict[Space, torch.Tensor]]  # of all channels of each space: (size,), on the CPU


@dataclass
class Reconfiguration:
    """What changed: widths (before, after) by space name, the paths of removed blocks and of gated convolutions.

    `given_up` is how many of the removed channels were alive.
    """

    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    given_up: int = 0
    removed_blocks: list[str] = field(default_factory=list)
    gated: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.widths or self.removed_blocks or self.gated)

    def summary(self) -> str:
        """One line: how many channels went from how many layers, and which blocks."""
        channels = counted(sum(before - after for before, after in self.widths.values()), "channel")
        alive = f" ({self.given_up} of them alive)" if self.given_up else ""
        parts = [f"{channels} of {counted(len(self.widths), 'space')}{alive}"] if self.widths else []
        parts += [f"block {path}" for path in self.removed_blocks]
        removed = "removed " + ", ".join(parts) if parts else ""
        gated = f"gated {counted(len(self.gated), 'convolution')}" if self.gated else ""
        return "; ".join(filter(None, (removed, gated)))


def channel_importance(graph: ChannelGraph) -> dict[Space, torch.Tensor]:
    """max |w| of every channel over all slots that have weights: below the threshold only if dead in *every* one.

    Infinite where no slot has weights: such a channel is never dead. (size,) for each space, on the CPU.
    """
    importance = {space: torch.full((space.size,), -1.0) for space in graph.spaces}
    for axis in graph.axes:
        if axis.weight is None:
            continue
        magnitude = axis.magnitude().float().cpu()
        for start, segment in axis.placed():
            if segment.space is not None:
                entries = magnitude[start : start + segment.length].view(-1, segment.span).amax(1)
                importance[segment.space] = torch.maximum(importance[segment.space], entries)
    return {space: found.masked_fill(found < 0, float("inf")) for space, found in importance.items()}


def live_channels(graph: ChannelGraph, threshold: float) -> int:
    """How many channels of all spaces are alive by channel union: those whose max |w| is `threshold` or more."""
    return sum(int((importance >= threshold).sum()) for importance in channel_importance(graph).values())


def reconfigure(
    graph: ChannelGraph,
    *,
    threshold: float = 1e-4,
    rounding: Rounding = NO_ROUNDING,
    residual: Literal["union", "gating"] = "union",
    optimizer: Optimizer | None = None,
    importance_of: ImportanceOf = channel_importance,
) -> Reconfiguration:
    """Remove what is dead: first blocks with an empty space inside, then channels by channel union (Lym et al., 4.2).

    Args:
        threshold: a channel is dead if its importance is below this. With `residual="gating"` it is also what max |w|
            of the weights of one convolution is compared with.
        rounding: which widths layers may have; the default keeps what is alive and at least one channel a layer.
        residual: "gating" lets each convolution at a residual sum read and write only the sum's channels that are
            alive in it; "union" keeps a channel in all of them if it is alive in one.
        optimizer: its state follows.
        importance_of: gives the importance of every channel; max |w| over all of its weights by default.
    """
    result = Reconfiguration()
    importance = importance_of(graph)
    dead = {space for space, found in importance.items() if not (found >= threshold).any()}
    for block in list(graph.blocks):
        if _is_dead(block, dead) and graph.can_remove(block) and _fold(graph, block, dead):
            graph.remove_block(block, optimizer)
            result.removed_blocks.append(block.path)
    if result.removed_blocks:
        importance = importance_of(graph)
    alive = {space: found >= threshold for space, found in importance.items()}
    keep = rounding.channels_to_keep(graph, importance, alive)
    result.given_up = sum(int((alive[space] & ~kept).sum()) for space, kept in keep.items())
    changes = {space: kept.nonzero().flatten() for space, kept in keep.items() if not kept.all()}
    result.widths = {space.name: (space.size, len(index)) for space, index in changes.items()}
    graph.reindex_spaces(changes, optimizer)
    if residual == "gating":
        gates = gates_at_sums(graph, threshold, rounding.min_channels)
        result.gated = list(gates)
        if gates:
            graph.gate(gates, optimizer)
    return result


def _is_dead(block: Block, dead: set[Space]) -> bool:
    """Whether nothing that a block adds depends on its input, or nothing that it concatenates is used any more."""
    if block.kind == "cat":
        return dead.issuperset(block.outputs)
    return _dead_layer(block, dead) is not None


def _dead_layer(block: Block, dead: set[Space]) -> str | None:
    """The path of the last layer in a block that everything passes and that has no live input."""
    return next((path for path, space in reversed(block.inputs.items()) if space in dead), None)


@torch.no_grad()
def _fold(graph: ChannelGraph, block: Block, dead: set[Space]) -> bool:
    """Move what a dead block adds besides what `remove_block` leaves into its last norm; False if that cannot be done.

    The biases after an empty space make the block's last convolution put out constants, which batch norm in training
    turns into its own bias, and in evaluation into something else. Zero padding makes them a pattern along the border,
    which neither can do.
    """
    path = _dead_layer(block, dead)
    if block.kind == "cat" or path is None or path == block.branch.last:
        return True
    constant = constant_output(graph, path, block.branch.last)
    if constant is None:
        return False
    norm: Any = graph.model.get_submodule(block.branch.norm) if block.branch.norm else None
    if getattr(norm, "running_mean", None) is not None:
        norm.running_mean -= constant
        return True
    per_channel = norm is not None and not isinstance(norm, nn.GroupNorm)
    return per_channel or not bool(constant.any())


def gates_at_sums(graph: ChannelGraph, threshold: float, min_channels: int = 1) -> dict[str, Gate]:
    """path -> gate, for convolutions at residual sums with channels that are alive elsewhere but dead in them."""
    sums = {space for space in graph.spaces if _is_summed(space)}
    gates: dict[str, Gate] = {}
    for axis in graph.axes:
        module, spaces = axis.module, {segment.space for segment in axis.segments}
        if axis.weight is None or not isinstance(module, nn.Conv2d) or module.groups > 1 or not spaces <= sums:
            continue
        if graph.is_tied(axis.path):
            continue  # the other layer would lose the weights, too, and reads and writes all of its channels
        alive = axis.magnitude().cpu() >= threshold
        if alive.all() or alive.sum() < min_channels or (axis.role == "produces" and module.bias is not None):
            continue
        index, gate = alive.nonzero().flatten(), gates.get(axis.path, Gate())
        gates[axis.path] = gate._replace(reads=index) if axis.role == "consumes" else gate._replace(writes=index)
    return gates


def _is_summed(space: Space) -> bool:
    """Whether several layers make the space's channels: they meet in a sum."""
    return sum(slot.role == "produces" or hasattr(slot.axis.module, "left") for slot in space.slots) > 1
