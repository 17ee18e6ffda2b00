"""Initial weights of a network."""

from __future__ import annotations

import math

from torch import nn

from morphtrain.morph.effective import redrawn


def initialise(module: nn.Module) -> None:
    """Draw a convolution's weights from N(0, 2 / fan_out) (He et al. 2015, arXiv 1502.01852); zero its bias.

    For use with `nn.Module.apply`. The fan-out of a grouped convolution is that of one group; torch's
    `kaiming_normal_` counts all groups, which makes a depthwise convolution of C channels start smaller by sqrt(C).
    """
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        with redrawn(module):
            nn.init.normal_(module.weight, 0, math.sqrt(2.0) / math.sqrt(fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def fresh_weights(model: nn.Module) -> None:
    """Give a network of any structure new random weights, in place.

    Convolutions start as in MorphTrain's networks (`initialise`), other layers as torch starts them.
    """
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            with redrawn(module):
                module.reset_parameters()  # type: ignore[operator]
    model.apply(initialise)
