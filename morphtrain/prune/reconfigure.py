"""From dead channels to a smaller network: channel union, block removal, rounding (Lym et al. 2019, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from morphtrain.morph import Axis, Block, ChannelGraph, Space


@dataclass
class Reconfiguration:
    """What changed: widths (before, after) by space name, and the paths of removed blocks."""

    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    removed_blocks: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.widths or self.removed_blocks)

    def summary(self) -> str:
        """One line: how many channels went from how many layers, and which blocks."""
        channels = sum(before - after for before, after in self.widths.values())
        parts = [f"{channels} channels of {len(self.widths)} spaces"] if self.widths else []
        parts += [f"block {path}" for path in self.removed_blocks]
        return "removed " + ", ".join(parts)


def reconfigure(
    graph: ChannelGraph,
    *,
    threshold: float = 1e-4,
    min_channels: int = 1,
    round_to: int = 1,
    optimizer: Optimizer | None = None,
) -> Reconfiguration:
    """Remove what is dead: first residual branches with an empty space inside, then channels by channel union.

    Args:
        threshold: a channel is dead in a weight where max |w| is below this.
        min_channels: every layer keeps at least this many channels, the strongest.
        round_to: widths are rounded up to a multiple of this by keeping the strongest dead channels.
        optimizer: its state follows.
    """
    result = Reconfiguration()
    strengths = {space: channel_strength(space) for space in graph.spaces}
    for block in list(graph.blocks):
        if _is_dead(block, strengths, threshold):
            _remove(graph, block, strengths, threshold, optimizer)
            result.removed_blocks.append(block.path)
    keep = channels_to_keep(graph, threshold, min_channels, round_to)
    changes = {space: kept.nonzero().flatten() for space, kept in keep.items() if not kept.all()}
    result.widths = {space.name: (space.size, len(index)) for space, index in changes.items()}
    graph.reindex_spaces(changes, optimizer)
    return result


def _is_dead(block: Block, strengths: dict[Space, torch.Tensor], threshold: float) -> bool:
    """Whether a block adds at most a constant, or concatenates nothing that anything still uses."""

    def empty(space: Space) -> bool:
        return not bool((strengths[space] >= threshold).any())

    if block.kind == "cat":
        return all(map(empty, block.outputs))
    # Without a norm, the biases behind an empty space would make the last convolution add more than its own.
    return any(map(empty, block.spaces if block.branch.norm else block.spaces[-1:]))


def _remove(
    graph: ChannelGraph, block: Block, strengths: dict[Space, torch.Tensor], threshold: float, optimizer: Any
) -> None:
    norm: Any = graph.model.get_submodule(block.branch.norm) if block.branch.norm else None
    graph.remove_block(block, optimizer)
    last_is_empty = not block.spaces or not bool((strengths[block.spaces[-1]] >= threshold).any())
    if block.kind == "sum" and not last_is_empty and hasattr(norm, "reset_running_stats"):
        # The last convolution still saw a constant (earlier norms' biases), of which batch norm leaves its own bias
        # in training: let evaluation agree.
        norm.reset_running_stats()


def channel_strength(space: Space) -> torch.Tensor:
    """max |w| of every channel over all slots that have weights: below the threshold only if dead in *every* one."""
    magnitudes = [slot.magnitude() for slot in space.slots if slot.has_weights]
    if not magnitudes:
        return torch.full((space.size,), float("inf"))
    return torch.stack(magnitudes).amax(0).cpu()


def live_channels(graph: ChannelGraph, threshold: float) -> int:
    """Channels of all spaces that are alive by channel union."""
    return sum(int((channel_strength(space) >= threshold).sum()) for space in graph.spaces)


def channels_to_keep(
    graph: ChannelGraph, threshold: float, min_channels: int, round_to: int
) -> dict[Space, torch.Tensor]:
    """space -> mask (size,) of the channels that stay."""
    strengths = {space: channel_strength(space) for space in graph.spaces}
    keep = {space: strength >= threshold for space, strength in strengths.items()}
    axes = [axis for axis in graph.axes if axis.weight is not None]
    while any([_revive(axis, keep, strengths, min_channels, round_to) for axis in axes]):
        pass  # reviving in one layer may put another off its multiple; it only ever adds, so this ends
    return keep


def _revive(
    axis: Axis,
    keep: dict[Space, torch.Tensor],
    strengths: dict[Space, torch.Tensor],
    min_channels: int,
    round_to: int,
) -> bool:
    """Keep the strongest dead channels of `axis` until its width is allowed; whether there were any."""
    spaces = [segment.space for segment in axis.segments if segment.space]
    if not spaces:
        return False
    fixed = sum(segment.fixed_size for segment in axis.segments)
    width = fixed + sum(int(keep[space].sum()) for space in spaces)
    total = fixed + sum(space.size for space in spaces)
    wanted = max(width, min_channels)
    wanted = min(-(-wanted // round_to) * round_to, total)
    dead = [(float(strengths[s][i]), s, i) for s in spaces for i in (~keep[s]).nonzero().flatten().tolist()]
    dead.sort(key=lambda channel: -channel[0])
    for _, space, i in dead[: wanted - width]:
        keep[space][i] = True
    return wanted > width
