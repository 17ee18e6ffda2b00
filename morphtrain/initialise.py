"""Initial weights of a network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from morphtrain.errors import UserError
from morphtrain.morph import copy_of
from morphtrain.morph.effective import fold, originals


def initialise(module: nn.Module) -> None:
    """Draw a convolution's weights from N(0, 2 / fan_out) (He et al. 2015, arXiv 1502.01852); zero its bias.

    For use with `nn.Module.apply`. The fan-out of a grouped convolution is that of one group; torch's
    `kaiming_normal_` counts all groups, which makes a depthwise convolution of C channels start smaller by sqrt(C).
    """
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2.0) / math.sqrt(fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def fresh_weights(model: nn.Module) -> None:
    """Give a network of any structure new random weights, in place.

    Convolutions start as in MorphTrain's networks (`initialise`), other layers as torch starts them. Weights that are
    computed (weight norm, spectral norm) start as if they had just been given to a new layer.

    Raises:
        UserError: for a weight whose computation has no inverse.
    """
    plain = {module: _plain(module) for module in model.modules() if parametrize.is_parametrized(module)}
    for module in model.modules():
        layer = plain.get(module, module)
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()  # type: ignore[operator]
    model.apply(lambda module: initialise(plain.get(module, module)))
    for module, layer in plain.items():
        _take_over(module, layer)


def _plain(module: nn.Module) -> nn.Module:
    """A copy whose weights are not computed, so that they can be written into."""
    layer = copy_of(module)
    fold(layer)
    return layer


@torch.no_grad()
def _take_over(module: nn.Module, layer: nn.Module) -> None:
    """Give a module the values of its plain copy: what its weights are computed from by torch's `right_inverse`."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            tensor.copy_(getattr(layer, name))
    for name, computed in module.parametrizations.items():  # type: ignore[operator,union-attr]
        values: Any = getattr(layer, name)
        for step in reversed(list(computed)):
            if not hasattr(step, "right_inverse"):
                kind, what = type(step).__name__, f"the {name} of a {type(layer).__name__}"
                raise UserError(f"{what}: {kind}, which computes it, has no right_inverse; it gets no new values")
            values = step.right_inverse(values)
        for original, value in zip(originals(computed), [values] if computed.is_tensor else values, strict=True):
            original.copy_(value)
