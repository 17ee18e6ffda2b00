"""How the weights of a network start."""

from __future__ import annotations

import math

from torch import nn


def initialise(module: nn.Module) -> None:
    """Draw a convolution's weights from N(0, 2 / fan_out) (He et al. 2015, arXiv 1502.01852), its bias at zero.

    For `nn.Module.apply`. The fan-out of a convolution of g groups is that of one group; torch's `kaiming_normal_`
    takes all of them together and starts a depthwise one of C channels smaller by sqrt(C).
    """
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2.0) / math.sqrt(fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def fresh_weights(model: nn.Module) -> None:
    """New random weights for a network of any structure.

    Each layer starts as torch would start it, convolutions as those of MorphTrain's networks.
    """
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    model.apply(initialise)
