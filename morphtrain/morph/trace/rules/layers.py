"""How each layer of `torch.nn`, and each of our own, moves channels, and which of its tensors hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from morphtrain.morph.layers import NoChannels, PadChannels, Scale, ScatterChannels, SelectChannels, ZeroBranch
from morphtrain.morph.trace.kinds import ACTIVATIONS, CONVOLUTIONS, NORMS, POOLING_AND_PADDING, TRANSPOSED
from morphtrain.morph.trace.labelled import LabelledGraph
from morphtrain.morph.trace.labels import along, fixed
from morphtrain.morph.trace.nodes import fixed_like
from morphtrain.morph.trace.rules import moves, per_channel, weighted

# (graph, call, the layer, the call that made its input, the layer's output) -> labels of the output
Rule = Callable[[LabelledGraph, fx.Node, Any, fx.Node, Any], torch.Tensor]


def follow(g: LabelledGraph, n: fx.Node, module: nn.Module, value: Any) -> Any:
    """The labels of a layer's output; refused if there is no rule for the layer."""
    if isinstance(module, ParametrizationList):  # code reads a weight that is computed
        g.pin_computed(module)
        return fixed(value.dim())
    rule = next((rule for kinds, rule in RULES.items() if isinstance(module, kinds)), None)
    if per_channel.declares_it(module):
        rule = per_channel.follow
    if isinstance(module, NoChannels):  # may be called with a list
        return along(g.joins.fresh(0), 1, value.dim())
    inputs = [a for a in n.all_input_nodes if a in g.labels]
    if rule is None and all(map(g.is_fixed, inputs)):
        return fixed_like(value)  # for instance an embedding of the network's input
    if rule is None or len(inputs) != 1:
        g.refuse(n, f"module {type(module).__name__}" + (f" of {len(inputs)} inputs" if rule else ""))
    return rule(g, n, module, inputs[0], value)


def _convolution(g: LabelledGraph, n: fx.Node, m: Any, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    transposed = isinstance(m, TRANSPOSED)
    channels = g.line(x, -len(m.kernel_size) - 1)
    return weighted.convolution(g, m, str(n.target), channels, m.groups, transposed, value)


def _linear(g: LabelledGraph, n: fx.Node, m: Any, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return weighted.linear(g, m, str(n.target), g.line(x, -1), value)


def _norm(g: LabelledGraph, n: fx.Node, m: nn.Module, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return along(weighted.norm(g, m, str(n.target), g.line(x, 1)), 1, value.dim())


def _layer_norm(g: LabelledGraph, n: fx.Node, m: nn.LayerNorm, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Channels that share their statistics cannot change."""
    g.pin_varying(x, range(-len(m.normalized_shape), 0))
    return g.labels[x]


def _prelu(g: LabelledGraph, n: fx.Node, m: nn.PReLU, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    if m.num_parameters > 1:
        labels = g.line(x, 1)
        labels = g.axis(str(n.target), m, "channels", "elementwise", (("weight", 0),), labels, "num_parameters")
        return along(labels, 1, value.dim())
    return g.labels[x]


def _pad_channels(g: LabelledGraph, n: fx.Node, m: PadChannels, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    path = str(n.target)
    left = g.axis(path, m, "left", "elementwise", (), g.joins.fresh(m.left), "left")
    right = g.axis(path, m, "right", "elementwise", (), g.joins.fresh(m.right), "right")
    return along(torch.cat([left, g.line(x, 1), right]), 1, value.dim())


def _select_channels(g: LabelledGraph, n: fx.Node, m: SelectChannels, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    source = g.line(x, 1)
    gathered = source[m.index.cpu()]
    g.gather(n, m, source, gathered)
    return along(gathered, 1, value.dim())


def _scatter_channels(
    g: LabelledGraph, n: fx.Node, m: ScatterChannels, x: fx.Node, value: torch.Tensor
) -> torch.Tensor:
    gathered = g.line(x, 1)
    source = g.joins.fresh(m.width)
    source[m.index.cpu()] = gathered
    g.gather(n, m, source, gathered)
    return along(source, 1, value.dim())


def _zero_branch(g: LabelledGraph, n: fx.Node, m: ZeroBranch, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    path = str(n.target)
    labels = g.axis(path, m, "channels", "elementwise", (("bias", 0),), g.joins.fresh(m.channels), "channels")
    if m.norm is not None:
        g.joins.join(weighted.norm(g, m.norm, f"{path}.norm", labels), labels)
    return along(labels, 1, value.dim())


def _unchanged(g: LabelledGraph, n: fx.Node, m: Any, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return moves.unchanged(g, n, x, value)


def _windowed(g: LabelledGraph, n: fx.Node, m: Any, x: fx.Node, value: Any) -> torch.Tensor:
    kind = next(kind.__name__ for kind in type(m).__mro__ if kind in POOLING_AND_PADDING)
    width = int(kind[-2]) if kind[-2:] in ("1d", "2d", "3d") else len(g.shape(x)) - 2
    return moves.windowed(g, n, x, value, width)


def _softmax(g: LabelledGraph, n: fx.Node, m: Any, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    dim = getattr(m, "dim", None)  # Softmax2d has none: it works over the channels
    g.pin_varying(x, [1 if dim is None else dim])
    return g.labels[x]


def _response_norm(g: LabelledGraph, n: fx.Node, m: nn.Module, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Each channel is divided by what its neighbours have."""
    g.pin_varying(x, [1])
    return g.labels[x]


def _flatten(g: LabelledGraph, n: fx.Node, m: nn.Flatten, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return moves.flattened(g, x, value)


def _unflatten(g: LabelledGraph, n: fx.Node, m: nn.Unflatten, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    dim = m.dim if isinstance(m.dim, int) else g.refuse(n, "module Unflatten of a named dimension")
    sizes: list[Any] = [-1] * len(g.shape(x))
    sizes[dim : dim % len(sizes) + 1] = list(m.unflattened_size)
    return moves.reshaped(g, x, value, sizes, [None] * len(sizes))


def _pixel_shuffle(g: LabelledGraph, n: fx.Node, m: Any, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    factor = m.upscale_factor if isinstance(m, nn.PixelShuffle) else m.downscale_factor
    return moves.pixel_shuffled(g, n, x, value, factor, isinstance(m, nn.PixelShuffle))


def _channel_shuffle(
    g: LabelledGraph, n: fx.Node, m: nn.ChannelShuffle, x: fx.Node, value: torch.Tensor
) -> torch.Tensor:
    return moves.channel_shuffled(g, n, x, m.groups)


RULES: dict[tuple[type, ...], Rule] = {
    (*CONVOLUTIONS, *TRANSPOSED): _convolution,
    (nn.Linear,): _linear,
    NORMS: _norm,
    (nn.LayerNorm, nn.RMSNorm): _layer_norm,
    (nn.LocalResponseNorm, nn.CrossMapLRN2d): _response_norm,
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
    POOLING_AND_PADDING: _windowed,
    (*ACTIVATIONS, Scale): _unchanged,
}
