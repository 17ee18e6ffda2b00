"""Training steps of a network's single layers, at any widths: what `latency.measured_cost` times."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from morphtrain.cost.widths import Layer, Side
from morphtrain.morph import NORMS, SAMPLES, ChannelGraph, format_of_model, input_type
from morphtrain.morph.formats import format_of
from morphtrain.morph.surgery.widths import refresh_widths

LADDER = 8  # channels from one measured width to the next
SHARES = ((1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (0.75, 0.75), (0.5, 0.5), (0.25, 0.25))  # of both sides of a layer
SETTINGS = ("kernel_size", "stride", "padding", "output_padding", "dilation", "padding_mode")
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")  # tensors of norms

Autocast = Callable[[], AbstractContextManager[Any]]
Widths = tuple[int, int]  # entries of both sides of a layer's weight


class LayerSteps:
    """Makes training steps of single layers, in the type, format and batch size of the network's own.

    A step is the forward and backward pass of a convolution or linear layer, of the norm that follows it if it has no
    other user, and then of a ReLU, on noise. The first layer of the network gives its input no gradient.

    Args:
        batch_size: images that go through the network at once.
        autocast: the context the network runs in.

    Attributes:
        facts: what the times depend on besides the layers, by name.
    """

    def __init__(self, graph: ChannelGraph, batch_size: int, autocast: Autocast = nullcontext) -> None:
        parameter = next(graph.model.parameters())
        self.device, self.dtype = parameter.device, input_type(graph.model)
        self.layout, self.batch_size, self.autocast = format_of_model(graph.model), batch_size, autocast
        self.norms = {path: m for path, m in graph.model.named_modules() if isinstance(m, NORMS)}
        self.first = graph.calls[0] if graph.calls else None
        with autocast():
            self.computed = F.linear(*torch.zeros(2, 1, 1, dtype=self.dtype, device=self.device)).dtype
        self.stock: dict[torch.dtype, torch.Tensor] = {}  # noise, of which inputs and gradients are views
        self.facts = {
            "weights": str(self.dtype),
            "computed_in": str(self.computed),
            "memory_format": str(self.layout),
            "batch_size": str(batch_size),
        }

    def kind(self, layer: Layer) -> str:
        """All that a layer's time depends on besides its widths and `facts`, as text: alike layers have the same."""
        module, norm = layer.module, self._norm(layer)
        outputs, inputs = ("any" if side.changes else side.size for side in layer.sides)
        shape, channels = layer.call.input_shape, _channels(module, layer.call.input_shape)
        positions = [shape[0] // SAMPLES, *(size for dim, size in enumerate(shape[1:], 1) if dim != channels)]
        groups = f"inputs, times {_multiplier(layer)}" if layer.is_depthwise else getattr(module, "groups", 1)
        parts = [
            type(module).__name__,
            *(f"{name}={getattr(module, name)}" for name in SETTINGS if hasattr(module, name)),
            f"groups={groups}",
            f"sides={outputs},{inputs}",
            f"bias={module.bias is not None}",
            f"positions={positions}",
            f"norm={type(norm).__name__}{getattr(norm, 'ghost_batch_size', '')}",
            f"first={layer.call is self.first}",
        ]
        return " ".join(parts)

    def widths(self, layer: Layer) -> list[Widths]:
        """Where a layer is measured: at its own widths, and below them on the ladder, both sides together and apart."""
        steps = [_ladder_step(layer, side) for side in layer.sides]
        found = [tuple(map(_narrowed, layer.sides, steps, shares)) for shares in SHARES]
        return list(dict.fromkeys((n0, n1) for n0, n1 in found))

    def step(self, layer: Layer, widths: Widths) -> Callable[[], None]:
        """A training step of a copy of `layer` with these widths; what it leaves is as it was before."""
        block = self._block(layer, widths)
        first = layer.call is self.first
        shape = list(layer.call.input_shape)
        shape[0] = shape[0] * self.batch_size // SAMPLES
        shape[_channels(layer.module, shape)] = getattr(block[0], "in_channels", None) or block[0].in_features

        def run() -> None:
            x = self._noise(shape, self.dtype if first else self.computed, self.layout).requires_grad_(not first)
            with torch.enable_grad(), self.autocast():
                y = block(x)
            y.backward(self._noise(y.shape, y.dtype, format_of(y)))
            block.zero_grad()

        return run

    def _norm(self, layer: Layer) -> nn.Module | None:
        """The norm that belongs to the layer's time; synchronised ones cannot run in one process of several."""
        norm = self.norms.get(layer.call.norm)
        return None if isinstance(norm, nn.SyncBatchNorm) else norm

    def _block(self, layer: Layer, widths: Widths) -> Any:
        """The layer with these widths, its norm and a ReLU."""
        twin, norm = copy.deepcopy(layer.module).train(), self._norm(layer)
        shape = (*widths, *twin.weight.shape[2:])
        weight = self._noise(shape, self.dtype, torch.contiguous_format).clone()
        twin.weight = nn.Parameter(weight.to(memory_format=self.layout) if weight.dim() == 4 else weight)
        if layer.is_depthwise:
            twin.groups = widths[0] // _multiplier(layer)
        refresh_widths(twin)
        outputs = getattr(twin, "out_channels", None) or twin.out_features
        if twin.bias is not None:
            twin.bias = nn.Parameter(twin.weight.new_zeros(outputs))
        return nn.Sequential(twin) if norm is None else nn.Sequential(twin, _sized(norm, outputs), nn.ReLU())

    def _noise(self, shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
        """Noise of this shape, a view of what all inputs and gradients share."""
        numbers = math.prod(shape)
        if dtype not in self.stock or len(self.stock[dtype]) < numbers:
            generator = torch.Generator(self.device).manual_seed(0)
            self.stock[dtype] = torch.randn(numbers, generator=generator, device=self.device).to(dtype)
        flat = self.stock[dtype][:numbers]
        if layout is torch.channels_last and len(shape) == 4:
            samples, channels, height, width = shape
            return flat.view(samples, height, width, channels).permute(0, 3, 1, 2).detach()
        return flat.view(*shape).detach()


def _channels(module: Any, shape: Sequence[int]) -> int:
    """The dimension of a layer's input that holds the channels: the last one of a linear layer."""
    return len(shape) + 1 - module.weight.dim()


def _multiplier(layer: Layer) -> int:
    """Rows of the weight of a depthwise convolution for each of its groups."""
    return int(layer.module.weight.shape[0] // layer.module.groups)


def _ladder_step(layer: Layer, side: Side) -> int:
    """Entries of a side from one measured width to the next."""
    spans = [segment.span for segment in side.axis.segments if segment.space] if side.axis is not None else []
    parts = 1
    if side is layer.sides[0]:  # outputs (or the inputs of a transposed convolution): the same number in every group
        parts = _multiplier(layer) if layer.is_depthwise else getattr(layer.module, "groups", 1)
    return math.lcm(LADDER * max(spans, default=1), parts)


def _narrowed(side: Side, step: int, share: float) -> int:
    size = side.length({})
    return min(size, max(round(share * size / step), 1) * step) if side.changes and share < 1 else size


def _sized(norm: nn.Module, channels: int) -> nn.Module:
    """A copy of a norm for this number of channels."""
    twin: Any = copy.deepcopy(norm).train()
    for name in PER_CHANNEL:
        tensor = getattr(twin, name, None)
        if isinstance(tensor, nn.Parameter):
            setattr(twin, name, nn.Parameter(tensor.new_ones(channels)))
        elif tensor is not None:
            setattr(twin, name, tensor.new_ones(channels))
    if isinstance(twin, nn.GroupNorm):
        twin.num_channels, twin.num_groups = channels, math.gcd(channels, twin.num_groups)
    else:
        twin.num_features = channels
    return twin
