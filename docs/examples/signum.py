"""An optimizer of one's own: the sign of the momentum (Bernstein et al. 2018, arXiv 1802.04434)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class Signum(Optimizer):
    """w <- w - lr * sign(v), with v <- momentum * v + (1 - momentum) * gradient.

    State that has the shape of its parameter, like `momentum_buffer`, follows when channels come and go.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                parameter.add_(buffer.sign(), alpha=-group["lr"])
