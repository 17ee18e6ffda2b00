"""From dead channels to a smaller network: channel union or gating, block removal, rounding (Lym et al. 2019, 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain.morph import Axis, Block, ChannelGraph, Gate, Space
from morphtrain.prune.widths import MULTIPLES, WidthProbe

Strengths = Callable[[ChannelGraph], dict[Space, torch.Tensor]]  # of every channel of every space: (size,), on the CPU


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
        channels = sum(before - after for before, after in self.widths.values())
        alive = f" ({self.given_up} of them alive)" if self.given_up else ""
        parts = [f"{channels} channels of {len(self.widths)} spaces{alive}"] if self.widths else []
        parts += [f"block {path}" for path in self.removed_blocks]
        removed = "removed " + ", ".join(parts) if parts else ""
        gated = f"gated {len(self.gated)} convolutions" if self.gated else ""
        return "; ".join(filter(None, (removed, gated)))


def reconfigure(
    graph: ChannelGraph,
    *,
    threshold: float = 1e-4,
    min_channels: int = 1,
    round_to: int | WidthProbe = 1,
    round_down: float = 0.0,
    residual: Literal["union", "gating"] = "union",
    optimizer: Optimizer | None = None,
    strengths_of: Strengths | None = None,
) -> Reconfiguration:
    """Remove what is dead: first blocks with an empty space inside, then channels by channel union.

    Args:
        threshold: a channel is dead in a weight where max |w| is below this.
        min_channels: every layer keeps at least this many channels, the strongest.
        round_to: widths are rounded up to a multiple of this by keeping the strongest dead channels; or to what a
            probe finds fastest.
        round_down: with a probe: widths may be rounded down, too, where that is faster. The weakest live channels go
            then, of those whose strength is at most this share, in [0, 1), of the median of their space's live ones.
        residual: "gating" lets each convolution at a residual sum read and write only the sum's channels that are
            alive in it; "union" keeps a channel in all of them if it is alive in one.
        optimizer: its state follows.
        strengths_of: what the threshold is for, instead of max |w| over all weights of a channel, `channel_strengths`.

    Raises:
        ValueError: for `round_down` without a probe.
    """
    if round_down and not isinstance(round_to, WidthProbe):
        raise ValueError(f"round_down={round_down} needs a WidthProbe as round_to, to tell which widths are faster")
    strengths_of = strengths_of or channel_strengths
    result = Reconfiguration()
    strengths = strengths_of(graph)
    dead = {space for space, strength in strengths.items() if not (strength >= threshold).any()}
    for block in list(graph.blocks):
        if _is_dead(block, dead) and graph.can_remove(block):
            _remove(graph, block, dead, optimizer)
            result.removed_blocks.append(block.path)
    if result.removed_blocks:
        strengths = strengths_of(graph)
    keep = channels_to_keep(graph, strengths, threshold, min_channels, round_to, round_down)
    result.given_up = sum(int((~kept & (strengths[space] >= threshold)).sum()) for space, kept in keep.items())
    changes = {space: kept.nonzero().flatten() for space, kept in keep.items() if not kept.all()}
    result.widths = {space.name: (space.size, len(index)) for space, index in changes.items()}
    graph.reindex_spaces(changes, optimizer)
    if residual == "gating":
        gates = gates_at_sums(graph, threshold, min_channels)
        result.gated = list(gates)
        if gates:
            graph.gate(gates, optimizer)
    return result


def _is_dead(block: Block, dead: set[Space]) -> bool:
    """Whether a block adds at most a constant, or concatenates nothing that anything still uses."""
    if block.kind == "cat":
        return dead.issuperset(block.outputs)
    # Without a norm, the biases behind an empty space would make the last convolution add more than its own.
    return not dead.isdisjoint(block.spaces if block.branch.norm else block.spaces[-1:])


def _remove(graph: ChannelGraph, block: Block, dead: set[Space], optimizer: Optimizer | None) -> None:
    norm: Any = graph.model.get_submodule(block.branch.norm) if block.branch.norm else None
    graph.remove_block(block, optimizer)
    if block.kind == "sum" and block.spaces[-1] not in dead and hasattr(norm, "reset_running_stats"):
        # The last convolution still saw a constant (earlier norms' biases), of which batch norm leaves its own bias
        # in training: let evaluation agree.
        norm.reset_running_stats()


def channel_strengths(graph: ChannelGraph) -> dict[Space, torch.Tensor]:
    """max |w| of every channel over all slots that have weights: below the threshold only if dead in *every* one."""
    strengths = {space: torch.full((space.size,), -1.0) for space in graph.spaces}
    for axis in graph.axes:
        if axis.weight is None:
            continue
        magnitude = axis.magnitude().float().cpu()
        for start, segment in axis.placed():
            if segment.space is not None:
                entries = magnitude[start : start + segment.length].view(-1, segment.span).amax(1)
                strengths[segment.space] = torch.maximum(strengths[segment.space], entries)
    return {space: s.masked_fill(s < 0, float("inf")) for space, s in strengths.items()}  # no weights: always alive


def live_channels(graph: ChannelGraph, threshold: float) -> int:
    """Channels of all spaces that are alive by channel union."""
    return sum(int((strength >= threshold).sum()) for strength in channel_strengths(graph).values())


def channels_to_keep(
    graph: ChannelGraph,
    strengths: Mapping[Space, torch.Tensor],
    threshold: float,
    min_channels: int,
    round_to: int | WidthProbe,
    round_down: float = 0.0,
) -> dict[Space, torch.Tensor]:
    """space -> mask (size,) of the channels that stay."""
    alive = {space: strength >= threshold for space, strength in strengths.items()}
    axes = [axis for axis in graph.axes if axis.weight is not None]
    keep = _revived(axes, alive, strengths, min_channels, round_to if isinstance(round_to, int) else 1)
    if isinstance(round_to, int):
        return keep
    options = [keep, *(_revived(axes, keep, strengths, min_channels, multiple) for multiple in MULTIPLES)]
    if round_down:
        floors = {space: max(_needed(strengths[space][kept], round_down), min_channels) for space, kept in keep.items()}
        lowered = [_lowered(axes, keep, strengths, floors, multiple) for multiple in MULTIPLES]
        again = zip(lowered, MULTIPLES, strict=True)  # where too many would have to go, up
        options += [*lowered, *(_revived(axes, kept, strengths, min_channels, multiple) for kept, multiple in again)]
    return dict(round_to.fastest(graph, options))


def _needed(strengths: torch.Tensor, share: float) -> int:
    """How many channels are stronger than `share` of their median; infinite ones, without weights, all are."""
    if len(strengths) == 0:
        return 0
    return int((strengths.isinf() | (strengths > share * strengths.median())).sum())


def _revived(
    axes: list[Axis],
    keep: dict[Space, torch.Tensor],
    strengths: Mapping[Space, torch.Tensor],
    min_channels: int,
    round_to: int,
) -> dict[Space, torch.Tensor]:
    """`keep` with the strongest dead channels that make every width allowed."""
    keep = {space: kept.clone() for space, kept in keep.items()}
    while any([_revive(axis, keep, strengths, min_channels, round_to) for axis in axes]):
        pass  # reviving in one layer may put another off its multiple; it only ever adds, so this ends
    return keep


def _revive(
    axis: Axis,
    keep: dict[Space, torch.Tensor],
    strengths: Mapping[Space, torch.Tensor],
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
    if wanted == width:
        return False
    dead = [(float(strengths[s][i]), s, i) for s in spaces for i in (~keep[s]).nonzero().flatten().tolist()]
    dead.sort(key=lambda channel: -channel[0])
    for _, space, i in dead[: wanted - width]:
        keep[space][i] = True
    return True


def _lowered(
    axes: list[Axis],
    keep: dict[Space, torch.Tensor],
    strengths: Mapping[Space, torch.Tensor],
    floors: Mapping[Space, int],
    round_to: int,
) -> dict[Space, torch.Tensor]:
    """`keep` without the weakest channels that put widths off their multiple, where the spaces' floors let them go."""
    keep = {space: kept.clone() for space, kept in keep.items()}
    for axis in axes:
        spaces = [segment.space for segment in axis.segments if segment.space]
        width = sum(segment.fixed_size for segment in axis.segments) + sum(int(keep[space].sum()) for space in spaces)
        spare = [channel for space in spaces for channel in _spare(space, keep[space], strengths[space], floors[space])]
        excess = width % round_to
        if excess <= len(spare) and excess < width:
            for _, space, i in sorted(spare, key=lambda channel: channel[0])[:excess]:
                keep[space][i] = False
    return keep


def _spare(space: Space, kept: torch.Tensor, strength: torch.Tensor, floor: int) -> list[tuple[float, Space, int]]:
    """(strength, space, position) of the kept channels of a space but for the `floor` strongest."""
    order = [i for i in strength.argsort().tolist() if kept[i]]
    return [(float(strength[i]), space, i) for i in order[: max(len(order) - floor, 0)]]


def gates_at_sums(graph: ChannelGraph, threshold: float, min_channels: int = 1) -> dict[str, Gate]:
    """path -> gate, for convolutions at residual sums with channels that are alive elsewhere but dead in them."""
    sums = {space for space in graph.spaces if _is_summed(space)}
    gates: dict[str, Gate] = {}
    for axis in graph.axes:
        module, spaces = axis.module, {segment.space for segment in axis.segments}
        if axis.weight is None or not isinstance(module, nn.Conv2d) or module.groups > 1 or not spaces <= sums:
            continue
        alive = axis.magnitude().cpu() >= threshold
        if alive.all() or alive.sum() < min_channels or (axis.role == "produces" and module.bias is not None):
            continue
        index, gate = alive.nonzero().flatten(), gates.get(axis.path, Gate())
        gates[axis.path] = gate._replace(reads=index) if axis.role == "consumes" else gate._replace(writes=index)
    return gates


def _is_summed(space: Space) -> bool:
    """Whether several layers make the space's channels: they meet in a sum."""
    return sum(slot.role == "produces" or hasattr(slot.axis.module, "left") for slot in space.slots) > 1
