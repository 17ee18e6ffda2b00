"""Kinds of torch's layers, by how they treat channels."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from morphtrain.morph.computation import plain_type

# Attributes of torch's layers that a change of width changes.
WIDTHS = (
    "in_channels",
    "out_channels",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "num_channels",
    "num_groups",
    "num_parameters",
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MIXING = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)  # they mix channels, unless they are depthwise
NORMS = (
    _BatchNorm,  # of any number of dimensions, synchronised, mean-only
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
)
ACTIVATIONS = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.RReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Hardshrink,
    nn.Softshrink,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Softplus,
    nn.Softsign,
    nn.Threshold,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
KEEP_SHAPE = (*NORMS, *ACTIVATIONS, nn.LayerNorm, nn.PReLU)
POOLING_AND_PADDING = (  # over the last dimensions, as many as the name says
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.LPPool1d,
    nn.LPPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
    nn.Upsample,
    nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d,
)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# Methods of a layer that do not take part in its forward pass.
BESIDE_FORWARD = frozenset(("extra_repr", "reset_parameters", "reset_running_stats", "_load_from_state_dict"))
TENSORS = frozenset(("weight", "bias", "running_mean", "running_var"))


def is_torch_layer(module: Any) -> bool:
    """Whether a module is a layer of torch's, or derived from one with its forward and all that this uses kept.

    A tensor of it may be computed (`torch.nn.utils.parametrize`).
    """
    kinds = plain_type(module).__mro__
    torchs = next(kind for kind in kinds if kind.__module__.startswith("torch.nn.modules."))
    if torchs is nn.Module or issubclass(torchs, CONTAINERS):
        return False
    forward = {name for kind in torchs.__mro__ if kind not in (nn.Module, object) for name in vars(kind)}
    forward = {name for name in forward if not name.startswith("__")} - BESIDE_FORWARD | TENSORS | {"__call__"}
    return forward.isdisjoint(name for kind in kinds[: kinds.index(torchs)] for name in vars(kind))
