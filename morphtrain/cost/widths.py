"""What a network costs as a function of the widths of its channel spaces (Gordon et al. 2018, sections 3.1 and 4).

    cost = WidthCost(graph, "flops")
    cost()                                # of the network as it is
    cost({space: space.size // 2})        # with half the channels of a space
    cost.coefficients(alive)              # what one channel of each space costs, by MorphNet's regulariser

A layer whose weight is n0 by n1 by a kernel costs pair * n0 * n1 + first * n0 + second * n1, and n0 and n1 are what the
spaces along the weight's first two dimensions add up to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from morphtrain.morph import MIXING, SAMPLES, TRANSPOSED, Axis, Call, ChannelGraph, Space

CostKind = Literal["flops", "model_size", "latency"]
BYTES = 4  # of a number


class Term(NamedTuple):
    """pair * n0 * n1 + first * n0 + second * n1."""

    pair: float
    first: float = 0.0
    second: float = 0.0

    def at(self, n0: float, n1: float) -> float:
        return self.pair * n0 * n1 + self.first * n0 + self.second * n1


@dataclass(eq=False)
class Side:
    """One of a weight's first two dimensions: an axis, or a size that never changes."""

    axis: Axis | None
    size: int

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
    """A call of a layer; it costs the largest of its terms."""

    sides: tuple[Side, Side]
    terms: tuple[Term, ...]

    def cost(self, widths: Mapping[Space, int]) -> float:
        n0, n1 = (side.fixed(widths) + side.total(widths) for side in self.sides)
        return max(term.at(n0, n1) for term in self.terms)

    def dominating(self, alive: Mapping[Space, float]) -> Term:
        n0, n1 = (side.fixed(alive) + side.total(alive) for side in self.sides)
        return max(self.terms, key=lambda term: term.at(n0, n1))


class WidthCost:
    """The cost of a sample's forward pass through the layers that a graph follows, by the widths of its spaces.

    Convolutions and linear layers that are modules count, all else is free, as in `cost.count_macs`. Modules that the
    graph was told to ignore are left out. The cost follows `graph.reindex`; after other changes (a block removed, a
    gate, another trace) make a new one.

    Args:
        kind: "flops": two for a multiply-accumulate. "model_size": the weights, those of several layers once.
            "latency": seconds by the roofline model, max(flops / peak, bytes / bandwidth) for each call of a layer,
            where the bytes are 4 for every input, output and weight, the weights' shared by the samples of a batch.
        batch_size: samples that share the reading of the weights; of "latency" only.
        roofline: (flops a second, bytes a second) of the device, as `cost.measure_roofline` gives them; of "latency"
            only, and needed there.

    Raises:
        ValueError: for another kind, or "latency" without a roofline.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        kind: CostKind,
        *,
        batch_size: int = 1,
        roofline: tuple[float, float] | None = None,
    ) -> None:
        if kind not in get_args(CostKind):
            raise ValueError(f"kind={kind!r}: must be one of {', '.join(get_args(CostKind))}")
        if kind == "latency" and roofline is None:
            raise ValueError("kind='latency' needs a roofline: (flops a second, bytes a second)")
        axes = {(id(getattr(a.module, name)), dim): a for a in graph.axes for name, dim in a.tensors}
        modules = {axis.path: axis.module for axis in graph.axes}
        self.layers: list[Layer] = []
        weights: set[int] = set()
        for call in graph.calls:
            module: Any = modules.get(call.path)
            if not isinstance(module, MIXING) or (kind == "model_size" and id(module.weight) in weights):
                continue
            weights.add(id(module.weight))
            zero, one = (Side(axes.get((id(module.weight), dim)), module.weight.shape[dim]) for dim in (0, 1))
            terms = _terms(module, call, one.axis is None, kind, batch_size, roofline)
            self.layers.append(Layer((zero, one), terms))

    def __call__(self, widths: Mapping[Space, int] | None = None) -> float:
        """The exact cost at these widths; spaces that are not in `widths` are as wide as they are now."""
        return sum(layer.cost(widths or {}) for layer in self.layers)

    def value(self, importance: Mapping[Space, torch.Tensor], alive: Mapping[Space, float]) -> Any:
        """MorphNet's regulariser, halved where both sides of a layer can change; a scalar tensor.

        sum over the layers of C/2 * (alive_1 * sum r_0 + alive_0 * sum r_1), or C * n_1 * sum r_0 where side 1 is
        fixed: the exact cost if every r is 0 or 1 and `alive` counts the ones. Of "latency" the dominating term at the
        `alive` widths counts.

        Args:
            importance: r of each channel (size,), of every space that can change; other spaces count as fixed.
            alive: of the same spaces the number of live channels, a constant to the derivative.
        """
        sums = {space: importance[space].sum() for space in alive}
        total: Any = 0.0
        for layer in self.layers:
            pair, first, second = layer.dominating(alive)
            (f0, a0, r0), (f1, a1, r1) = ((s.fixed(alive), s.total(alive), s.total(sums)) for s in layer.sides)
            total = total + pair * (f0 * f1 + f1 * r0 + f0 * r1 + (a1 * r0 + a0 * r1) / 2)
            total = total + first * (f0 + r0) + second * (f1 + r1)
        return torch.as_tensor(total)

    def coefficients(self, alive: Mapping[Space, float]) -> dict[Space, float]:
        """The derivative of `value` by the r of any one channel of each space in `alive`."""
        result = dict.fromkeys(alive, 0.0)
        for layer in self.layers:
            pair, first, second = layer.dominating(alive)
            zero, one = layer.sides
            for side, other, linear in ((zero, one, first), (one, zero, second)):
                slope = pair * (other.fixed(alive) + other.total(alive) / 2) + linear
                for space, span in side.spans(alive):
                    result[space] += span * slope
        return result


def _terms(
    module: Any, call: Call, depthwise: bool, kind: CostKind, batch_size: int, roofline: tuple[float, float] | None
) -> tuple[Term, ...]:
    """The terms of one call. `depthwise`: the weight's second dimension is no axis, its rows follow the inputs."""
    kernel = math.prod(module.weight.shape[2:])
    if kind == "model_size":
        return (Term(kernel),)
    transposed = isinstance(module, TRANSPOSED)
    channels = 1 - module.weight.dim()  # the activations' dimension; -1 of a linear layer
    inputs, outputs = _positions(call.input_shape, channels), _positions(call.output_shape, channels)
    flops = 2 * kernel * (inputs if transposed else outputs)
    if kind == "flops":
        return (Term(flops),)
    assert roofline is not None
    peak, bandwidth = roofline
    per_byte = BYTES / bandwidth
    groups = getattr(module, "groups", 1)
    if depthwise:  # n0 outputs, of which one or several are made from each input
        moved = (outputs + inputs * module.in_channels / module.out_channels, 0.0)
    elif transposed:  # n0 inputs, n1 outputs a group
        moved = (inputs, outputs * groups)
    else:  # n0 outputs, n1 inputs a group
        moved = (outputs, inputs * groups)
    return (Term(flops / peak), Term(per_byte * kernel / batch_size, per_byte * moved[0], per_byte * moved[1]))


def _positions(shape: torch.Size, channels: int) -> float:
    """Positions of one sample, of an activation with its channels in that dimension."""
    return math.prod(size for dim, size in enumerate(shape) if dim != channels % len(shape)) / SAMPLES
