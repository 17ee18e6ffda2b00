"""bfloat16 throughout: with masters of 32 bits, or without them and with steps that are rounded stochastically."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from morphtrain import schema
from morphtrain.morph import in_type
from morphtrain.precision.autocast import Precision, warn_if_slow
from morphtrain.precision.casting import Casting

LOW_BITS = 16  # of a float32, which a bfloat16 has not


class Stochastic(Casting):
    """Parameters of 16 bits, except for those of batch norms, whose steps are computed in 32 bits.

    From the end of the backward pass to the end of the step the weights and gradients are there in 32 bits, so that
    clipping, methods and the optimizer see them so; what the optimizer keeps (momentum) has 32 bits, too. At the end
    each weight becomes one of its two neighbours of 16 bits, the closer the likelier, so that in expectation it is what
    it was (Gupta et al. 2015, arXiv 1502.02551; for bfloat16 Zamirai et al. 2020, arXiv 2010.06192). To the nearest,
    steps of less than half the distance between two neighbours would all be lost.

    The random numbers are torch's, which a run seeds in each epoch.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, torch.bfloat16)
        self._widened: list[nn.Parameter] = []

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        in_type(model, self.dtype, besides=(_BatchNorm,))

    def unscale(self, optimizer: Optimizer) -> None:
        super().unscale(optimizer)
        self._widen(optimizer)

    def end_step(self, optimizer: Optimizer) -> None:
        self._round()

    def update(self, optimizer: Optimizer) -> None:
        self._widen(optimizer)
        super().update(optimizer)
        self._round()

    def _widen(self, optimizer: Optimizer) -> None:
        """Give the optimizer's parameters of 16 bits, and their gradients, 32."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.dtype is self.dtype:
                    gradient, parameter.grad = parameter.grad, None
                    parameter.data = parameter.data.float()
                    parameter.grad = None if gradient is None else gradient.float()
                    self._widened.append(parameter)

    @torch.no_grad()
    def _round(self) -> None:
        """Give them 16 bits again; their gradients are dropped."""
        for parameter in self._widened:
            parameter.grad = None
            parameter.data = stochastically_rounded(parameter.data)
        self._widened = []


def stochastically_rounded(x: torch.Tensor) -> torch.Tensor:
    """A float32 tensor in bfloat16: each number up or down to a neighbour, at random, with expectation `x`.

    Numbers that bfloat16 has stay; so do infinities and NaN.
    """
    bits = x.view(torch.int32)  # the rest of the bits is how far a number is from the neighbour nearer to zero
    up = torch.randint_like(bits, 1 << LOW_BITS)
    rounded = (bits + up).bitwise_and(-1 << LOW_BITS).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def build(config: schema.precision.PureBfloat16, device: torch.device) -> Precision:
    warn_if_slow(config.name, device, torch.bfloat16)
    return Stochastic(device) if config.rounding == "stochastic" else Casting(device, torch.bfloat16)
