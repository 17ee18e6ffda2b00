"""Channel surgery on live networks: find what must change together, change it, keep everything else.

    graph = ChannelGraph.trace(model, torch.randn(1, 3, 32, 32))
    for space in graph.spaces:
        graph.reindex(space, range(space.size // 2), optimizer=optimizer)

Imports torch and nothing else of MorphTrain; knows no training loop.
"""

from morphtrain.morph.architecture import describe, rebuild
from morphtrain.morph.branches import Block
from morphtrain.morph.formats import format_of_model
from morphtrain.morph.gates import Gate
from morphtrain.morph.graph import ChannelGraph
from morphtrain.morph.insert import Start
from morphtrain.morph.layers import PadChannels, ZeroBranch
from morphtrain.morph.modes import kept_modes
from morphtrain.morph.paths import is_ignored, is_within
from morphtrain.morph.points import Point
from morphtrain.morph.spaces import Axis, Slot, Space
from morphtrain.morph.trace import MorphError

__all__ = [
    "Axis",
    "Block",
    "ChannelGraph",
    "Gate",
    "MorphError",
    "PadChannels",
    "Point",
    "Slot",
    "Space",
    "Start",
    "ZeroBranch",
    "describe",
    "format_of_model",
    "is_ignored",
    "is_within",
    "kept_modes",
    "rebuild",
]
