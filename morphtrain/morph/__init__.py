"""Channel surgery on live networks: find what must change together, change it, keep everything else.

    graph = ChannelGraph.trace(model, torch.randn(1, 3, 32, 32))
    for space in graph.spaces:
        graph.reindex(space, range(space.size // 2), optimizer=optimizer)

`trace/` follows the channels through a network, `surgery/` changes it. This package knows no training loop.
"""

import importlib
from typing import TYPE_CHECKING, Any

from morphtrain.morph.errors import MorphError
from morphtrain.morph.formats import format_of_model
from morphtrain.morph.graph import ChannelGraph
from morphtrain.morph.layers import PadChannels, ZeroBranch
from morphtrain.morph.modes import copy_of, kept_buffers, kept_modes, stored_activations
from morphtrain.morph.number_types import SHORT, exact, in_type, input_type
from morphtrain.morph.paths import is_within, matches
from morphtrain.morph.spaces import Axis, ChannelGather, Slot, Space
from morphtrain.morph.surgery.additions import Additions, additions_of
from morphtrain.morph.surgery.architecture import DESCRIPTION, describe, rebuild
from morphtrain.morph.surgery.averages import Averages, averages_of
from morphtrain.morph.surgery.gates import Gate
from morphtrain.morph.surgery.insert import Start
from morphtrain.morph.surgery.statistics import restored
from morphtrain.morph.trace.blocks import Block
from morphtrain.morph.trace.calls import Call
from morphtrain.morph.trace.kinds import MIXING, NORMS, TRANSPOSED
from morphtrain.morph.trace.points import Point
from morphtrain.morph.trace.traced import OUTPUT, SAMPLES

__all__ = [
    "DESCRIPTION",
    "MIXING",
    "NORMS",
    "OUTPUT",
    "SAMPLES",
    "SHORT",
    "TRANSPOSED",
    "Additions",
    "Averages",
    "Axis",
    "Block",
    "Call",
    "ChannelGather",
    "ChannelGraph",
    "Gate",
    "MorphError",
    "PadChannels",
    "Point",
    "Slot",
    "Space",
    "Start",
    "ZeroBranch",
    "additions_of",
    "averages_of",
    "copy_of",
    "describe",
    "exact",
    "format_of_model",
    "in_type",
    "input_type",
    "is_within",
    "kept_buffers",
    "kept_modes",
    "matches",
    "rebuild",
    "restored",
    "stored_activations",
]

if not TYPE_CHECKING:  # or the type checker would take any name for one of this package

    def __getattr__(name: str) -> Any:
        """What has moved to `morphtrain.cost`, which stands above this package: scripts import it from here."""
        if name in ("CostKind", "WidthCost"):
            return getattr(importlib.import_module("morphtrain.cost"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
