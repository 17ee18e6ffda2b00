"""The widths that layers keep as attributes beside their tensors."""

from __future__ import annotations

from torch import nn

from morphtrain.morph.effective import effective
from morphtrain.morph.trace.kinds import CONVOLUTIONS, MIXING, TRANSPOSED, WIDTHS

# Attributes of torch's layers, and of ours, that a change of width changes.
ALL_WIDTHS = (*WIDTHS, "channels", "left", "right", "width")


def widths_of(module: nn.Module) -> dict[str, int]:
    """The widths that `module` keeps as attributes, by name."""
    own = vars(module)
    return {name: own[name] for name in ALL_WIDTHS if isinstance(own.get(name), int)}


def refresh_widths(module: nn.Module) -> None:
    """Set the widths of a convolution or linear layer to those of its weight."""
    if not isinstance(module, MIXING):
        return
    shape = effective(module).shape
    if isinstance(module, CONVOLUTIONS):
        module.out_channels = shape[0]
        module.in_channels = shape[1] * module.groups
    elif isinstance(module, TRANSPOSED):
        module.in_channels = shape[0]
        module.out_channels = shape[1] * module.groups
    else:
        module.out_features, module.in_features = shape
