"""Layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, arXiv 1708.03888)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain import schema
from morphtrain.optimizer.groups import decay_groups


class LARS(Optimizer):
    """SGD with momentum in which the gradient of each weight tensor is scaled by its trust ratio.

        ratio = trust_coefficient * ||w|| / (||g|| + weight_decay * ||w||)
        v <- momentum * v + ratio * (g + weight_decay * w)
        w <- w - lr * v

    (The paper's algorithm 1 has lr inside v, so the two differ while lr changes. Here v is as in torch and timm.) With
    Nesterov the step is that of `torch.optim.SGD`. The ratio is 1 where either norm is zero. State: `momentum_buffer`
    and, for `step_size`, the last `trust_ratio`.

    Args:
        params: parameters or groups; a group with `trust_coefficient` None takes plain SGD steps, meant for norm
            parameters and biases.
        lr: of all groups.
        trust_coefficient: eta in the paper.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        trust_coefficient: float | None = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; `closure`, if given, first recomputes the loss and the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step(parameters, group)
        return loss

    def step_size(self, parameter: torch.Tensor) -> Any:
        """lr times the trust ratio of the last step: what a gradient of `parameter` was multiplied by."""
        group = next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
        return group["lr"] * self.state[parameter].get("trust_ratio", 1.0)

    def _step(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        gradients: list[torch.Tensor] = [p.grad for p in parameters]  # type: ignore[misc]  # no None among them
        updates = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        if group["trust_coefficient"] is not None:
            ratios = _trust_ratios(parameters, gradients, group["trust_coefficient"], group["weight_decay"])
            for p, ratio in zip(parameters, ratios, strict=True):
                self.state[p]["trust_ratio"] = ratio
            updates = _scaled(updates, ratios)
        if group["momentum"] > 0:
            updates = self._with_momentum(parameters, updates, group["momentum"], group["nesterov"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _with_momentum(
        self, parameters: list[torch.Tensor], updates: list[torch.Tensor], momentum: float, nesterov: bool
    ) -> list[torch.Tensor]:
        for p, update in zip(parameters, updates, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(update)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, updates)
        return list(torch._foreach_add(updates, buffers, alpha=momentum)) if nesterov else buffers


def _trust_ratios(
    parameters: list[torch.Tensor], gradients: list[torch.Tensor], coefficient: float, weight_decay: float
) -> list[torch.Tensor]:
    """A scalar tensor per parameter, of 32 bits or more, since sums of squares soon leave the range of float16.

    No value is read, so nothing waits for the device.
    """
    exact = torch.promote_types(parameters[0].dtype, torch.float32)
    weights = torch.stack(torch._foreach_norm(parameters, dtype=exact))
    slopes = torch.stack(torch._foreach_norm(gradients, dtype=exact))
    ratios = coefficient * weights / (slopes + weight_decay * weights)
    return list(torch.where((weights > 0) & (slopes > 0), ratios, 1.0).unbind())


def _scaled(updates: list[torch.Tensor], ratios: list[torch.Tensor]) -> list[torch.Tensor]:
    """The updates times their ratios, in their own type; overwrites them."""
    wide = [update.to(ratio.dtype) for update, ratio in zip(updates, ratios, strict=True)]
    torch._foreach_mul_(wide, ratios)
    return [product.to(update.dtype) for product, update in zip(wide, updates, strict=True)]


def build(config: schema.optimizer.LARS, model: nn.Module) -> Optimizer:
    weights, vectors, *directions = decay_groups(model, config.weight_decay)
    for group in (weights, *directions):
        group["trust_coefficient"] = config.trust_coefficient
    vectors["trust_coefficient"] = None
    return LARS([weights, vectors, *directions], lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
