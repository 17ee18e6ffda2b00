"""Net2WiderNet (Chen, Goodfellow and Shlens 2015, arXiv 1511.05641, section 2.3) on any network.

    graph = ChannelGraph.trace(model, example)
    widen(graph, factor=2, noise=0.1, optimizer=optimizer)       # every space twice as wide
    widen(graph, target={"stages.0.0.branch.0": 24})             # one of them

New channels are copies of old ones, and the layers that use them split the old weights: the function is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.optim import Optimizer

from morphtrain.grow.size import check_memory
from morphtrain.morph import ChannelGraph, MorphError, Slot, Space
from morphtrain.morph.effective import assign, effective, scale


def widen(
    graph: ChannelGraph,
    factor: float | None = None,
    target: Mapping[str, int] | None = None,
    *,
    spaces: Sequence[Space] | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    optimizer: Optimizer | None = None,
) -> dict[str, tuple[int, int]]:
    """Widen channel spaces with random copies of their channels, without changing the function.

    Args:
        factor: on every width, 1 or more; the new width is rounded to the nearest integer.
        target: instead of a factor, new widths by space name; none below the present one.
        spaces: those that `factor` applies to; None: all that can be widened.
        noise: relative standard deviation of the uneven shares into which the weights that use a channel are split
            among its copies. Copies with equal shares get equal gradients and stay identical for ever; with uneven
            shares they diverge. The shares add up to the old weight, so the function is kept either way.
        generator: for the copies and the noise (on the CPU); None: torch's own.
        optimizer: its state follows: momentum is copied where channels are produced and split where they are consumed.

    Returns:
        widths (before, after) by the names of the spaces that became wider.

    Raises:
        MorphError: for an unknown space, a smaller width, or both or neither of factor and target.
        UserError: for widths that this machine has no memory for. In either case nothing is changed.
    """
    if (factor is None) == (target is None):
        raise MorphError("widen needs either a factor or a target")
    if target is None:
        assert factor is not None
        if factor < 1:
            raise MorphError(f"a factor of {factor} does not widen; 1 or more does")
        chosen = graph.spaces if spaces is None else spaces
        wanted = {space: round(factor * space.size) for space in chosen if not space.is_ambiguous}
    else:
        wanted = {graph.space(name): width for name, width in target.items()}
    for space, width in wanted.items():
        if width < space.size:
            raise MorphError(f"'{space.name}' already has {space.size} channels, {width} would not be wider")
    check_memory(graph, wanted)
    before = {space: space.size for space in wanted}
    copies = {s: _copies(s.size, width, generator) for s, width in wanted.items() if width > s.size}
    graph.reindex_spaces(copies, optimizer)
    if noise > 0:
        for space, index in copies.items():
            for slot in space.slots:
                if slot.role == "consumes" and slot.has_weights:
                    _share_unevenly(slot, index, noise, generator)
    return {space.name: (before[space], space.size) for space in copies}


def _copies(size: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
    """(width,): every old channel, then random ones; none is copied twice before all have been copied once."""
    more = -(-width // size) - 1
    rounds = (torch.randperm(size, generator=generator) for _ in range(more))
    return torch.cat([torch.arange(size), *rounds])[:width]


@torch.no_grad()
def _share_unevenly(slot: Slot, index: torch.Tensor, noise: float, generator: torch.Generator | None) -> None:
    """Add relative noise, which sums to zero over a channel's copies, to the weights that use them."""
    module, (name, dim) = slot.axis.module, slot.axis.tensors[0]
    before = effective(module, name)
    weight = before.clone()
    span = slot.segment.span
    entries = slice(slot.start, slot.start + len(index) * span)
    part = weight.movedim(dim, 0)[entries]  # (width * span, ...), a view
    source = (index[:, None] * span + torch.arange(span)).flatten()  # which old entry each one is a copy of
    drawn = torch.randn(part.shape, generator=generator, dtype=torch.float32)
    drawn = drawn.to(device=part.device, dtype=part.dtype) * part * noise
    source = source.to(part.device)
    sums = torch.zeros_like(part[: int(source.max()) + 1]).index_add_(0, source, drawn)
    counts = torch.bincount(source).to(part.dtype).view(-1, *[1] * (part.dim() - 1))
    part += drawn - (sums / counts)[source]
    try:
        assign(module, name, weight)
    except MorphError:  # it has no inverse, but may scale with what it starts from
        scale(module, name, torch.where(before != 0, weight / before, 1.0))
