"""Net2DeeperNet on any network: which layers and blocks to put in (Chen et al. 2015, arXiv 1511.05641, section 2.4).

`ChannelGraph.insert_layer` and `insert_block` do the surgery.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from morphtrain.morph import Block, ChannelGraph, Point, Start, is_within


def layer_places(graph: ChannelGraph) -> list[str]:
    """A convolution of each residual branch, its last; in a network without branches all.

    Of those that have an activation in front of them, which an identity needs.
    """
    last = {block.branch.last for block in graph.blocks if block.kind == "sum"}
    return [path for path in graph.layer_places if path in last or not last]


def stage_blocks(graph: ChannelGraph, end: Point) -> list[Block]:
    """The residual branches of the stage that ends at `end`: those that add to the same channels."""
    inside = [block for block in graph.blocks if block.kind == "sum" and is_within(block.branch.last, end.path)]
    sums = {space for block in inside for space in block.outputs}
    return [block for block in graph.blocks if block.kind == "sum" and not sums.isdisjoint(block.outputs)]


def block_like(graph: ChannelGraph, end: Point) -> tuple[list[int], int | None]:
    """(kernels, inner channels) of a new block behind `end`: those of the stage's last one; else 3, 3 and as it is."""
    for block in reversed(stage_blocks(graph, end)):
        layers = [graph.model.get_submodule(path) for path in block.branch.chain]
        convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        kernels = [int(layer.kernel_size[0]) for layer in convolutions]
        if len(kernels) > 1 and all(k % 2 for k in kernels) and all(layer.groups == 1 for layer in convolutions):
            return kernels, max(layer.out_channels for layer in convolutions[:-1])
    return [3, 3], None


def insert_block_like(
    graph: ChannelGraph, path: str, calibration: Sequence[Any], start: Start, optimizer: Optimizer | None = None
) -> str:
    """Put a block like the last one of the stage that ends at `path` behind it; returns the new block's path."""
    (end,) = (point for point in graph.stage_ends if point.path == path)
    kernels, inner = block_like(graph, end)
    width = None if start == "half_half" else inner  # an identity branch is as wide as what passes it
    return graph.insert_block(path, calibration, kernels=kernels, inner=width, start=start, optimizer=optimizer)
