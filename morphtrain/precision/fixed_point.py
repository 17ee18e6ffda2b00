"""Dynamic fixed point: a tensor as integers that share one exponent (Das et al. 2018, arXiv 1802.00930).

    y = quantise(x)                      # the values that 16 bits hold
    integers, exponent = encode(x)       # y is integers * 2**exponent
    with QuantisedLayers():              # every convolution and linear layer inside computes with such values
        loss = criterion(model(images), labels)
    loss.backward()                      # and so does its backward pass

The exponent is chosen by each tensor's largest value, whenever the tensor is used. With E = floor(log2 max |x|) and b
bits, integers count units of 2^(E - b + 2), so that the largest of them uses all bits but the sign's:

    i = round(x / 2^(E - b + 2)),  at least -(2^(b - 1) - 1) and at most 2^(b - 1) - 1

The integers are kept in 32-bit floats, which hold them exactly: this says what the format does to accuracy, and saves
neither time nor memory. Nothing is read off the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from morphtrain.layer_calls import Layer, LayerCalls, known_as

BITS = range(2, 17)
ROUNDINGS = ("nearest", "stochastic")
BIAS, MANTISSA_BITS = 127, 23  # of a 32-bit float


@torch.no_grad()
def quantise(
    x: torch.Tensor, bits: int = 16, rounding: str = "nearest", generator: torch.Generator | None = None
) -> torch.Tensor:
    """The values of `x` in dynamic fixed point, in the type, shape and memory format of `x`; `x` is left as it is.

    What is quantised already stays as it is, with either rounding. It passes no gradient: see `straight_through`.

    Args:
        x: of any shape, floating point; computed in 32 bits.
        bits: of an integer, with its sign, 2 to 16.
        rounding: "nearest" (halves to the even integer), or "stochastic": up with the probability of the fraction, so
            that the expected value is `x`, unless `x` lies within the last unit and is clamped.
        generator: of the random numbers of stochastic rounding, on the device of `x`; None: torch's own.

    Returns:
        NaN everywhere if a value is infinite or NaN: there is no exponent for it, and it should not pass unnoticed.

    Raises:
        ValueError: for other bits or another rounding.
    """
    return decode(*encode(x, bits, rounding, generator)).to(x.dtype)


@torch.no_grad()
def encode(
    x: torch.Tensor, bits: int = 16, rounding: str = "nearest", generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers of `x` in dynamic fixed point, and the exponent that they share; arguments as in `quantise`.

    Returns:
        The integers, as 32-bit floats of the shape and memory format of `x` (`.to(torch.int16)` holds them), and the
        exponent of their unit, E - b + 2, an int32 tensor of shape (). Of zeros, E is -1.
    """
    if bits not in BITS or rounding not in ROUNDINGS:
        raise ValueError(f"bits={bits}, rounding={rounding!r}: 2 to 16 bits, and nearest or stochastic, work")
    x = x.float()
    largest = torch.maximum(x.amax(), -x.amin()) if x.numel() else x.new_zeros(())
    exponent = torch.frexp(largest).exponent - (bits - 1)  # frexp: largest = m * 2^(E + 1), 0.5 <= m < 1
    first, second = _power_of_two(-exponent)
    first = torch.where(largest.isfinite(), first, math.nan)
    integers = _rounded((x * first).mul_(second), rounding, generator)
    limit = 2 ** (bits - 1) - 1
    return integers.clamp_(-limit, limit), exponent


@torch.no_grad()
def decode(integers: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """integers * 2**exponent in 32-bit floats, exactly: what `encode` has taken apart."""
    first, second = _power_of_two(exponent)
    return (integers * first).mul_(second)


def straight_through(
    x: torch.Tensor, bits: int = 16, rounding: str = "nearest", generator: torch.Generator | None = None
) -> torch.Tensor:
    """`quantise`, with a gradient that passes as if nothing had been rounded (Bengio et al. 2013, arXiv 1308.3432)."""
    quantised: torch.Tensor = _StraightThrough.apply(x, bits, rounding, generator)
    return quantised


class QuantisedLayers(LayerCalls):
    """A context in which convolutions and linear layers read dynamic fixed point, forwards and backwards.

    Inputs and weights are quantised, with straight-through gradients, and the gradient of the output before anything is
    computed from it. Biases, sums inside a layer, the gradients of weights, and all that lies between layers have 32
    bits. Where no gradient is asked for, rounding is to the nearest, so that an evaluation is no matter of luck.

    Args:
        bits, rounding: as in `quantise`. Random numbers are torch's own.
    """

    def __init__(self, bits: int = 16, rounding: str = "nearest") -> None:
        super().__init__()
        self.bits, self.rounding = bits, rounding

    def call(
        self,
        layer: Layer,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *rest: Any,
        **keywords: Any,
    ) -> torch.Tensor:
        if x.is_meta:  # a trace of the network asks for shapes
            return layer(x, weight, bias, *rest, **keywords)
        bits, rounding = self.bits, self.rounding if torch.is_grad_enabled() else "nearest"
        x, weight = straight_through(x, bits, rounding), known_as(straight_through(weight, bits, rounding), weight)
        output = layer(x, weight, bias, *rest, **keywords)
        if output.requires_grad:  # a hook: activations may change the output in place, which a view would not allow
            output.register_hook(lambda gradient: straight_through(gradient, bits, rounding))
        return output


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bits: int, rounding: str, generator: torch.Generator | None) -> torch.Tensor:
        return quantise(x, bits, rounding, generator)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad, None, None, None


def _rounded(scaled: torch.Tensor, rounding: str, generator: torch.Generator | None) -> torch.Tensor:
    """Whole numbers; `scaled` is overwritten."""
    if rounding == "nearest":
        return scaled.round_()
    below = scaled.floor()
    fraction = scaled.sub_(below)  # exact; to add a random number to the value instead would round whole numbers up
    return below.add_(torch.empty_like(below).uniform_(generator=generator) < fraction)


def _power_of_two(exponent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 32-bit floats whose product is 2**exponent, from -252 to 254, which need not be one itself."""
    half = exponent >> 1
    return _float_of(half), _float_of(exponent - half)


def _float_of(exponent: torch.Tensor) -> torch.Tensor:
    """2**exponent by its bits: `torch.pow` may be off by one in the last."""
    return ((exponent + BIAS) << MANTISSA_BITS).view(torch.float32)
