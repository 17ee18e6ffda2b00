"""The weights that a penalty acts on: parameters, or under weight norm a length and a direction of each channel.

A layer with weight norm (Salimans and Kingma 2016, arXiv 1602.07868) uses g * v / ||v||. Penalties, importance and
what fades out are about this product, and what changes it changes g and the direction of v. The norms of v stay: they
mean nothing but how fast the direction turns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from morphtrain.morph.computation import computation, is_weight_norm, norm_dim, originals
from morphtrain.morph.effective import scale


class Normed(NamedTuple):
    """The weight of a layer with weight norm, one length for each entry along `dim` (-1: one of the whole weight)."""

    length: torch.Tensor  # g: (O, 1, ...), where `dim` is 0
    direction: torch.Tensor  # v: (O, I, ...)
    dim: int


class Computed(NamedTuple):
    """A weight that is computed in another way: it can be scaled, but what a step does to it is not known."""

    module: nn.Module
    name: str


Weight = torch.Tensor | Normed | Computed


def weight_of(module: nn.Module, name: str) -> Weight:
    """What stands behind `module.<name>`."""
    computed = computation(module, name)
    if computed is None:
        plain: torch.Tensor = getattr(module, name)
        return plain
    if is_weight_norm(computed):
        g, v = originals(computed)
        return Normed(g, v, norm_dim(computed))
    return Computed(module, name)


def is_trained(weight: Weight) -> bool:
    """Whether all of a weight is trained, by steps that are known."""
    if isinstance(weight, Computed):
        return False
    return all(tensor.requires_grad for tensor in (weight[:2] if isinstance(weight, Normed) else (weight,)))


def value_of(weight: torch.Tensor | Normed) -> torch.Tensor:
    """The weight as the layer uses it, outside autograd."""
    if isinstance(weight, torch.Tensor):
        return weight.detach()
    with torch.no_grad():
        return torch._weight_norm(weight.direction, weight.length, weight.dim)


def shape_of(weight: torch.Tensor | Normed) -> torch.Size:
    """The shape of the weight."""
    return weight.shape if isinstance(weight, torch.Tensor) else weight.direction.shape


@torch.no_grad()
def multiply(weight: Weight, factors: torch.Tensor) -> None:
    """Multiply a weight by `factors`, which broadcast over it, in place. What is multiplied by zero is exactly zero.

    Of a direction that would be gone, the length becomes zero instead. Nothing waits for the device.
    """
    if isinstance(weight, torch.Tensor):
        weight.mul_(factors)
    elif isinstance(weight, Computed):
        scale(weight.module, weight.name, factors)
    else:
        g, v, dim = weight
        scaled = v * factors
        before, after = torch.norm_except_dim(v, 2, dim), torch.norm_except_dim(scaled, 2, dim)
        g.mul_(after / before)
        v.copy_(torch.where(after > 0, scaled * (before / after), v))


@torch.no_grad()
def add_to_gradient(weight: torch.Tensor | Normed, factors: torch.Tensor) -> None:
    """Add to the gradients behind a weight what factors * weight as the gradient of the weight would give them.

    Nothing happens where the loss does not depend on the weight.
    """
    if isinstance(weight, torch.Tensor):
        if weight.grad is not None:
            weight.grad.addcmul_(weight, factors.to(weight.grad.dtype))
        return
    g, v, dim = weight
    if g.grad is None or v.grad is None:
        return
    with torch.enable_grad():
        used = torch._weight_norm(v, g, dim)
    used.backward(used.detach() * factors)


@torch.no_grad()
def turning(weight: Normed) -> torch.Tensor:
    """(g / ||v||)^2, of the shape of g: how far a row turns for each length that a step of v goes along its gradient.

    The gradient of v is g / ||v|| times that of the weight across the row, and the row moves g / ||v|| times as far as
    v does. (Along the row it moves as far as g.)
    """
    return (weight.length / torch.norm_except_dim(weight.direction, 2, weight.dim)).square()
