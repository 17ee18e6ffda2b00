"""What a network costs as a function of the widths of its channel spaces (Gordon et al. 2018, sections 3.1 and 4).

    cost = WidthCost(graph, "flops")
    cost()                                # of the network as it is
    cost({space: space.size // 2})        # with half the channels of a space
    cost.coefficients(alive)              # what one channel of each space costs, by MorphNet's regulariser

A layer whose weight is n0 by n1 by a kernel costs pair * n0 * n1 + first * n0 + second * n1 + constant, and n0 and n1
are what the spaces along the weight's first two dimensions add up to. `latency.measured_cost` makes one of seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from morphtrain.morph import MIXING, SAMPLES, TRANSPOSED, Axis, Call, ChannelGraph, Space
from morphtrain.morph.effective import effective, identity

CostKind = Literal["flops", "model_size", "latency"]


class Term(NamedTuple):
    """pair * n0 * n1 + first * n0 + second * n1 + constant."""

    pair: float
    first: float = 0.0
    second: float = 0.0
    constant: float = 0.0

    def at(self, n0: float, n1: float) -> float:
        return self.pair * n0 * n1 + self.first * n0 + self.second * n1 + self.constant


@dataclass(eq=False)
class Side:
    """One of a weight's first two dimensions: an axis, or a size that never changes."""

    axis: Axis | None
    size: int

    @property
    def changes(self) -> bool:
        """Whether it has channels of a space."""
        return self.axis is not None and any(segment.space for segment in self.axis.segments)

    def length(self, widths: Mapping[Space, int]) -> int:
        """Entries if spaces had these widths; spaces that are not named keep theirs."""
        return self.size if self.axis is None else self.axis.length_at(widths)

    def fixed(self, free: Mapping[Space, Any]) -> int:
        """Entries that are not of one of the `free` spaces."""
        if self.axis is None:
            return self.size
        return sum(segment.length for segment in self.axis.segments if segment.space not in free)

    def spans(self, free: Mapping[Space, Any]) -> list[tuple[Space, int]]:
        """The `free` spaces on this side, each with the entries that a channel of it has; a space may occur twice."""
        segments = self.axis.segments if self.axis else []
        return [(segment.space, segment.span) for segment in segments if segment.space and segment.space in free]

    def total(self, amounts: Mapping[Space, Any]) -> Any:
        """`amounts` of channels of the spaces as entries of this side; other spaces do not count."""
        return sum((span * amounts[space] for space, span in self.spans(amounts)), 0.0)


@dataclass(eq=False)
class Layer:
    """A call of a convolution or linear layer; the sides are the first two dimensions of its weight."""

    module: Any
    call: Call
    sides: tuple[Side, Side]

    @property
    def is_depthwise(self) -> bool:
        """Whether the weight's second dimension cannot change because its rows follow the inputs."""
        return self.sides[1].axis is None and getattr(self.module, "groups", 1) > 1

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return effective(self.module).shape

    def positions(self) -> tuple[float, float]:
        """Positions of one sample in the input and in the output."""
        channels = 1 - len(self.shape)  # the activations' dimension; -1 of a linear layer
        inputs, outputs = self.call.input_shape, self.call.output_shape
        return _positions(inputs, channels), _positions(outputs, channels)


class WidthCost:
    """The cost of a network's layers by the widths of the spaces of its graph.

    Convolutions and linear layers that are modules count, all else is free, as in `cost.count_macs`. Modules that the
    graph was told to ignore are left out. The cost follows `graph.reindex`; after other changes (a block removed, a
    gate, another trace) make a new one.

    Args:
        kind: "flops": two for a multiply-accumulate of a sample's forward pass. "model_size": the weights, those of
            several layers once. "latency": seconds, as `term_of` says.
        term_of: what a layer costs, of "latency" only, and needed there: `latency.measured_cost` measures it.

    Raises:
        ValueError: for another kind, or "latency" without `term_of`.
    """

    def __init__(self, graph: ChannelGraph, kind: CostKind, *, term_of: Callable[[Layer], Term] | None = None) -> None:
        if kind not in get_args(CostKind):
            raise ValueError(f"kind={kind!r}: must be one of {', '.join(get_args(CostKind))}")
        if (term_of is None) == (kind == "latency"):
            raise ValueError("kind='latency' needs term_of, what a layer costs, and no other kind takes it")
        layers = layers_of(graph)
        if kind == "model_size":
            layers = list({identity(layer.module): layer for layer in reversed(layers)}.values())[::-1]
        price = term_of or {"flops": _flops, "model_size": _weights}[kind]
        self.layers = [(layer.sides, price(layer)) for layer in layers]

    def __call__(self, widths: Mapping[Space, int] | None = None) -> float:
        """The exact cost at these widths; spaces that are not in `widths` are as wide as they are now."""
        present = widths or {}
        return sum(term.at(zero.length(present), one.length(present)) for (zero, one), term in self.layers)

    def value(self, importance: Mapping[Space, torch.Tensor], alive: Mapping[Space, float]) -> Any:
        """MorphNet's regulariser, halved where both sides of a layer can change; a scalar tensor.

        sum over the layers of C/2 * (alive_1 * sum r_0 + alive_0 * sum r_1), or C * n_1 * sum r_0 where side 1 is
        fixed: the exact cost if every r is 0 or 1 and `alive` counts the ones.

        Args:
            importance: r of each channel (size,), of every space that can change; other spaces count as fixed.
            alive: of the same spaces the number of live channels, a constant to the derivative.
        """
        sums = {space: importance[space].sum() for space in alive}
        total: Any = 0.0
        for sides, (pair, first, second, constant) in self.layers:
            (f0, a0, r0), (f1, a1, r1) = ((s.fixed(alive), s.total(alive), s.total(sums)) for s in sides)
            total = total + pair * (f0 * f1 + f1 * r0 + f0 * r1 + (a1 * r0 + a0 * r1) / 2)
            total = total + first * (f0 + r0) + second * (f1 + r1) + constant
        return torch.as_tensor(total)

    def coefficients(self, alive: Mapping[Space, float]) -> dict[Space, float]:
        """The derivative of `value` by the r of any one channel of each space in `alive`."""
        result = dict.fromkeys(alive, 0.0)
        for (zero, one), (pair, first, second, _) in self.layers:
            for side, other, linear in ((zero, one, first), (one, zero, second)):
                slope = pair * (other.fixed(alive) + other.total(alive) / 2) + linear
                for space, span in side.spans(alive):
                    result[space] += span * slope
        return result


def layers_of(graph: ChannelGraph) -> list[Layer]:
    """Every call of a convolution or linear layer that the graph follows, in the order of execution."""
    axes = {(identity(a.module, name), dim): a for a in graph.axes for name, dim in a.tensors}
    modules: dict[str, Any] = {axis.path: axis.module for axis in graph.axes}
    layers = []
    for call in graph.calls:
        module = modules.get(call.path)
        if isinstance(module, MIXING):
            weight, shape = identity(module), effective(module).shape
            zero, one = (Side(axes.get((weight, dim)), shape[dim]) for dim in (0, 1))
            layers.append(Layer(module, call, (zero, one)))
    return layers


def _flops(layer: Layer) -> Term:
    inputs, outputs = layer.positions()
    kernel = math.prod(layer.shape[2:])
    return Term(2 * kernel * (inputs if isinstance(layer.module, TRANSPOSED) else outputs))


def _weights(layer: Layer) -> Term:
    return Term(math.prod(layer.shape[2:]))


def _positions(shape: torch.Size, channels: int) -> float:
    """Positions of one sample, of an activation with its channels in that dimension."""
    return math.prod(size for dim, size in enumerate(shape) if dim != channels % len(shape)) / SAMPLES
