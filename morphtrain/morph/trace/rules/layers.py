"""How each layer of `torch.nn`, and each of our own, moves channels and which of its tensors hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from morphtrain.morph.layers import NoChannels, PadChannels, Scale, ScatterChannels, SelectChannels, ZeroBranch
from morphtrain.morph.trace.labels import along
from morphtrain.morph.trace.nodes import fixed_like
from morphtrain.morph.trace.rules import functions as function_rules
from morphtrain.morph.trace.rules import movement as movement_rules

if TYPE_CHECKING:
    from morphtrain.morph.trace.propagator import Propagator

Rule = Callable[["Propagator", fx.Node, Any, fx.Node, Any], torch.Tensor]


def follow(p: Propagator, n: fx.Node, module: nn.Module, value: Any) -> Any:
    """The labels behind a layer; refused if there is no rule for it."""
    rule = next((rule for kinds, rule in RULES.items() if isinstance(module, kinds)), None)
    if isinstance(module, NoChannels):  # which may be called with a list
        return along(p.joins.fresh(0), 1, value.dim())
    inputs = [a for a in n.all_input_nodes if a in p.labels]
    if rule is None and all(map(p.is_fixed, inputs)):
        return fixed_like(value)  # as an embedding of what comes in
    if rule is None or len(inputs) != 1:
        p.refuse(n, f"module {type(module).__name__}" + (f" of {len(inputs)} inputs" if rule else ""))
    return rule(p, n, module, inputs[0], value)


NORM_TENSORS = (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0))


def _convolution(p: Propagator, n: fx.Node, m: Any, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    transposed = isinstance(m, TRANSPOSED)
    channels = p.line(n, x, -len(m.kernel_size) - 1)
    return convolution(p, m, str(n.target), channels, m.groups, transposed, value)


def convolution(
    p: Propagator,
    m: nn.Module,
    path: str,
    x: torch.Tensor,
    groups: int,
    transposed: bool,
    value: torch.Tensor,
    weight: str = "weight",
    bias: str | None = "bias",
) -> torch.Tensor:
    """Labels of a convolution's output. `x` (I,): those of its input channels; `m` owns `weight` and perhaps `bias`.

    Of several groups, channels of the same place in their group stand and fall together: all groups stay equally
    wide. With one input channel a group the outputs follow it instead, and groups come and go.
    """
    dim = value.dim() - getattr(m, weight).dim() + 1
    outputs = value.shape[dim]
    if 1 < groups == len(x) and (not transposed or outputs == groups):
        p.axis(path, m, weight + " groups", "elementwise", (), x, "groups")
        rows = x.repeat_interleave(outputs // groups)
        rows = p.axis(path, m, weight, "elementwise", _behind(weight, bias), rows)
        return along(rows, dim, value.dim())
    inputs = x.view(groups, -1)
    p.joins.tie(inputs, 0)
    if transposed:  # weight (I, O/groups, ...)
        p.axis(path, m, weight + " in", "consumes", ((weight, 0),), x)
        group = p.joins.fresh(outputs // groups)
        p.axis(path, m, weight + " out", "produces", ((weight, 1),), group)
        rows = _spread(p, group, groups)
        rows = p.axis(path, m, weight + " bias", "elementwise", _behind(bias), rows)
        return along(rows, dim, value.dim())
    p.axis(path, m, weight + " in", "consumes", ((weight, 1),), inputs[0])  # weight (O, I/groups, ...)
    rows = _spread(p, p.joins.fresh(outputs // groups), groups)
    rows = p.axis(path, m, weight + " out", "produces", _behind(weight, bias), rows)
    return along(rows, dim, value.dim())


def _behind(*names: str | None) -> tuple[tuple[str, int], ...]:
    """The tensors whose first dimension is a layer's outputs."""
    return tuple((name, 0) for name in names if name is not None)


def _spread(p: Propagator, group: torch.Tensor, groups: int) -> torch.Tensor:
    """(O/groups,) -> (O,): labels of all groups, joined place by place."""
    if groups == 1:
        return group
    rows = p.joins.fresh(len(group) * groups)
    p.joins.join(rows.view(groups, -1), group)
    return rows


def _linear(p: Propagator, n: fx.Node, m: Any, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return linear(p, m, str(n.target), p.line(n, x, -1), value)


def linear(
    p: Propagator,
    m: nn.Module,
    path: str,
    x: torch.Tensor,
    value: torch.Tensor,
    weight: str = "weight",
    bias: str | None = "bias",
) -> torch.Tensor:
    """Labels of a linear layer's output. `x` (I,): those of its input features; `m` owns `weight`, perhaps `bias`."""
    p.axis(path, m, weight + " in", "consumes", ((weight, 1),), x)
    out = p.joins.fresh(value.shape[-1])
    out = p.axis(path, m, weight + " out", "produces", _behind(weight, bias), out)
    return along(out, -1, value.dim())


def _norm(p: Propagator, n: fx.Node, m: nn.Module, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return along(norm(p, m, str(n.target), p.line(n, x, 1)), 1, value.dim())


def norm(p: Propagator, m: nn.Module, path: str, x: torch.Tensor) -> torch.Tensor:
    """Labels behind a norm.

    Batch and instance norm treat each channel by itself. The channels of a group norm's group share their statistics:
    they stand and fall together.
    """
    if not isinstance(m, nn.GroupNorm):
        return p.axis(path, m, "channels", "elementwise", NORM_TENSORS, x, "num_features")
    labels = p.axis(path, m, "channels", "elementwise", NORM_TENSORS, x, "num_channels")
    groups = labels.view(m.num_groups, -1)
    p.joins.tie(groups, 1)
    p.axis(path, m, "groups", "elementwise", (), groups[:, 0], "num_groups")
    return labels


def _layer_norm(p: Propagator, n: fx.Node, m: nn.LayerNorm, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """All channels that share their statistics stand and fall together: they stay."""
    p.keep_varying(x, range(-len(m.normalized_shape), 0))
    return p.labels[x]


def _prelu(p: Propagator, n: fx.Node, m: nn.PReLU, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    if m.num_parameters > 1:
        labels = p.line(n, x, 1)
        labels = p.axis(str(n.target), m, "channels", "elementwise", (("weight", 0),), labels, "num_parameters")
        return along(labels, 1, value.dim())
    return p.labels[x]


def _pad_channels(p: Propagator, n: fx.Node, m: PadChannels, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    path = str(n.target)
    left = p.axis(path, m, "left", "elementwise", (), p.joins.fresh(m.left), "left")
    right = p.axis(path, m, "right", "elementwise", (), p.joins.fresh(m.right), "right")
    return along(torch.cat([left, p.line(n, x, 1), right]), 1, value.dim())


def _select_channels(p: Propagator, n: fx.Node, m: SelectChannels, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    source = p.line(n, x, 1)
    picked = source[m.index.cpu()]
    p.pick(n, m, source, picked)
    return along(picked, 1, value.dim())


def _scatter_channels(p: Propagator, n: fx.Node, m: ScatterChannels, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    picked = p.line(n, x, 1)
    source = p.joins.fresh(m.width)
    source[m.index.cpu()] = picked
    p.pick(n, m, source, picked)
    return along(source, 1, value.dim())


def _zero_branch(p: Propagator, n: fx.Node, m: ZeroBranch, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    path = str(n.target)
    labels = p.axis(path, m, "channels", "elementwise", (("bias", 0),), p.joins.fresh(m.channels), "channels")
    if m.norm is not None:
        p.joins.join(norm(p, m.norm, f"{path}.norm", labels), labels)
    return along(labels, 1, value.dim())


def _unchanged(p: Propagator, n: fx.Node, m: Any, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return function_rules.unchanged(p, n, x, value)


def _softmax(p: Propagator, n: fx.Node, m: Any, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    dim = getattr(m, "dim", None)  # Softmax2d has none: it is over the channels
    p.keep_varying(x, [1 if dim is None else dim])
    return p.labels[x]


def _flatten(p: Propagator, n: fx.Node, m: nn.Flatten, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return movement_rules.flattened(p, x, value)


def _unflatten(p: Propagator, n: fx.Node, m: nn.Unflatten, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    dim = m.dim if isinstance(m.dim, int) else p.refuse(n, "module Unflatten of a named dimension")
    sizes: list[Any] = list(p.shape(x))
    sizes[dim : dim % len(sizes) + 1] = list(m.unflattened_size)
    return movement_rules.reshaped(p, x, value, sizes)


def _pixel_shuffle(p: Propagator, n: fx.Node, m: Any, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    factor = m.upscale_factor if isinstance(m, nn.PixelShuffle) else m.downscale_factor
    return movement_rules.pixel_shuffled(p, n, x, value, factor, isinstance(m, nn.PixelShuffle))


def _channel_shuffle(p: Propagator, n: fx.Node, m: nn.ChannelShuffle, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return movement_rules.channel_shuffled(p, n, x, m.groups)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
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

RULES: dict[tuple[type, ...], Rule] = {
    (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED): _convolution,
    (nn.Linear,): _linear,
    NORMS: _norm,
    (nn.LayerNorm, nn.RMSNorm): _layer_norm,
    (nn.PReLU,): _prelu,
    (PadChannels,): _pad_channels,
    (SelectChannels,): _select_channels,
    (ScatterChannels,): _scatter_channels,
    (ZeroBranch,): _zero_branch,
    (nn.Flatten,): _flatten,
    (nn.Unflatten,): _unflatten,
    (nn.PixelShuffle, nn.PixelUnshuffle): _pixel_shuffle,
    (nn.ChannelShuffle,): _channel_shuffle,
    (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d): _softmax,
    (
        *ACTIVATIONS,
        Scale,
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
        nn.ZeroPad2d,
        nn.ConstantPad1d,
        nn.ConstantPad2d,
        nn.ReflectionPad1d,
        nn.ReflectionPad2d,
        nn.ReplicationPad1d,
        nn.ReplicationPad2d,
        nn.Upsample,
        nn.UpsamplingNearest2d,
        nn.UpsamplingBilinear2d,
    ): _unchanged,
}
