"""Net2DeeperNet on any network: which layers and blocks to insert (Chen et al. 2015, arXiv 1511.05641, section 2.4).

`ChannelGraph.insert_layer` and `insert_block` do the surgery.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from morphtrain.morph import Block, ChannelGraph, Point, Start, is_within


def layer_places(graph: ChannelGraph) -> list[str]:
    """The convolutions to put a layer in front of: the last of each residual branch; without branches, all.

    Only those with an activation in front count: the new identity layer needs it.
    """
    last = {block.branch.last for block in graph.blocks if block.kind == "sum"}
    return [path for path in graph.layer_places if path in last or not last]


def stage_blocks(graph: ChannelGraph, end: Point) -> list[Block]:
    """The residual branches of the stage that ends at `end`: those that add to the same channels."""
    inside = [block for block in graph.blocks if block.kind == "sum" and is_within(block.branch.last, end.path)]
    sums = {space for block in inside for space in block.outputs}
    return [block for block in graph.blocks if block.kind == "sum" and not sums.isdisjoint(block.outputs)]


def block_like(graph: ChannelGraph, end: Point) -> tuple[list[int], int | None]:
    """(kernels, inner channels) of a new block after `end`: those of the stage's last block, or else 3, 3 and None."""
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
    """Insert after `path`, the end of a stage, a block like the stage's last one; returns the new block's path."""
    end = graph.block_places[path]  # `stage_ends` may be others once a network has its first block
    kernels, inner = block_like(graph, end)
    width = None if start == "half_half" else inner  # an identity branch has its own
    return graph.insert_block(path, calibration, kernels=kernels, inner=width, start=start, optimizer=optimizer)
