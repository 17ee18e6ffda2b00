"""Networks with layers whose weight is computed, and the steps that compute it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _WeightNorm, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

X = torch.randn(4, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])
Wrap = Callable[[Any], Any]


class Masked(nn.Module):
    """W with some entries off: a buffer of the weight's shape."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand_like(weight) > 0.3).to(weight.dtype))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


class RowScale(nn.Module):
    """W with a trained factor for each row: a parameter of another shape."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(len(weight), *[1] * (weight.dim() - 1)) + 0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


class Squashed(nn.Module):
    """tanh W: a selection of rows is one, but half of it needs the inverse."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.tanh()

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.atanh()


class OneWay(nn.Module):
    """tanh W without an inverse."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.tanh()


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + weight.transpose(0, 1)


class Fickle(nn.Module):
    """Does something else with few rows."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if len(weight) > 4 else 2 * weight


def own(kind: type[nn.Module], takes_weight: bool = False) -> Wrap:
    def wrap(layer: nn.Module) -> nn.Module:
        return register_parametrization(layer, "weight", kind(layer.weight) if takes_weight else kind())

    return wrap


def twice(layer: nn.Module) -> nn.Module:
    return own(RowScale, True)(own(Masked, True)(layer))


WRAPS: dict[str, Wrap] = {
    "weight norm": weight_norm,
    "weight norm of inputs": lambda layer: weight_norm(layer, dim=1),
    "weight norm of the whole": lambda layer: weight_norm(layer, dim=None),
    "masked": own(Masked, True),
    "row scale": own(RowScale, True),
    "squashed": own(Squashed),
    "twice": twice,
}


class Net(nn.Module):
    """A residual sum, groups, a depthwise and a transposed convolution, batch norm in some places."""

    def __init__(self, wrap: Wrap = lambda layer: layer, norms: bool = True) -> None:
        super().__init__()
        self.stem = wrap(nn.Conv2d(3, 8, 3, padding=1))
        self.norm = nn.BatchNorm2d(8) if norms else nn.Identity()
        self.a = wrap(nn.Conv2d(8, 6, 3, padding=1))
        self.b = wrap(nn.Conv2d(6, 8, 1, bias=False))
        self.norm_b = nn.BatchNorm2d(8) if norms else nn.Identity()
        self.grouped = wrap(nn.Conv2d(8, 8, 3, padding=1, groups=2))
        self.depthwise = wrap(nn.Conv2d(8, 8, 3, padding=1, groups=8))
        self.plain = nn.Conv2d(8, 6, 1)
        self.up = wrap(nn.ConvTranspose2d(6, 6, 2, 2))
        self.head = wrap(nn.Linear(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm_b(self.b(self.a(x).relu()))).relu()
        x = self.plain(self.depthwise(self.grouped(x).relu()).relu()).relu()
        return self.head(self.up(x).relu().mean((2, 3)))


def made(wrap: Wrap, norms: bool = True) -> Any:
    torch.manual_seed(0)
    return Net(wrap, norms).double()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()
    optimizer.zero_grad()


class Derived(_WeightNorm):
    """torch's weight norm by another name, as one in another memory format."""


def derived(layer: Any) -> Any:
    return register_parametrization(layer, "weight", Derived(0), unsafe=True)


def two_spectral(layer: Any) -> Any:
    """Spectral norm on two of the layers, weight norm on the others."""
    return spectral_norm(layer) if getattr(layer, "in_channels", 0) in (6,) else weight_norm(layer)


def shared_computation(layer: Any) -> nn.Module:
    """Two layers with one computed weight."""
    first, second = weight_norm(nn.Conv2d(8, 8, 1)), weight_norm(nn.Conv2d(8, 8, 1))
    second.parametrizations["weight"] = first.parametrizations["weight"]
    return nn.Sequential(first, second)
