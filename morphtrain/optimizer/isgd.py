"""Inconsistent SGD (Wang, Yang, Min and Chakradhar 2016, arXiv 1603.05544): extra steps for batches with a high loss.

In one's own loop, over the same batches in the same order in every epoch:

    losses = LossQueue(batches=len(loader))
    for images, labels in loader:
        closure = functools.partial(gradients_of, images, labels)   # new gradients of the batch; returns its loss
        limit = losses.exceeded_by(closure())
        subproblem = Subproblem(optimizer) if limit is not None else None
        optimizer.step()
        if subproblem is not None:
            with kept_buffers(model):                               # batch norm's running statistics
                subproblem.solve(closure, limit)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.method import Closure, Method
from morphtrain.morph import kept_buffers
from morphtrain.optimizer.sgd import build
from morphtrain.state import Run

log = logging.getLogger(__name__)

__all__ = ["ISGD", "LossQueue", "Subproblem", "build", "build_method"]


class LossQueue:
    """The losses of the last `batches` batches, and the limit that they set to the next one.

    Args:
        batches: in an epoch, n.
        sigmas: standard deviations by which the limit is above the mean.
        device: of the losses.

    Attributes:
        losses: (n,), float32; the next loss replaces the oldest.
        count: how many losses there have been.
    """

    def __init__(self, batches: int, sigmas: float = 3.0, device: torch.device | None = None) -> None:
        self.sigmas, self.count = sigmas, 0
        self.losses = torch.zeros(batches, device=device)

    @property
    def limit(self) -> torch.Tensor | None:
        """mean + sigmas * standard deviation of the last n losses, a scalar; None before there have been n."""
        if self.count < len(self.losses):
            return None
        return self.losses.mean() + self.sigmas * self.losses.std(correction=0)

    def exceeded_by(self, loss: torch.Tensor) -> torch.Tensor | None:
        """Add the loss of a batch, a scalar; returns the limit of those before it if it is above that, or else None.

        From the second epoch on this waits for the device.
        """
        limit = self.limit
        self.losses[self.count % len(self.losses)] = loss.detach()
        self.count += 1
        return limit if limit is not None and bool(loss > limit) else None


class Subproblem:
    """The conservative subproblem of a batch with a high loss: to lower it without moving the weights far.

        min over w of 1/2 (loss(w) - limit)^2 + eps / (2 n) |w - before|^2

    `before` are the weights as they are when this is made, before the batch's own step, and n is their number.

    Args:
        optimizer: of the weights; it also says their learning rates.
        eps: of the formula.
        zeta: the length of a step, as a multiple of the learning rate of its parameter group.
    """

    def __init__(self, optimizer: Optimizer, eps: float = 0.1, zeta: float = 1.0) -> None:
        self.optimizer, self.zeta = optimizer, zeta
        self.before = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
        self.pull = eps / sum(weight.numel() for weight in self.before.values())

    def solve(self, closure: Callable[[], torch.Tensor], limit: torch.Tensor, stop: int = 5) -> int:
        """Take at most `stop` steps of gradient descent, until the loss is not above `limit` any more.

            w <- w - zeta * lr * [(loss - limit) * gradient + eps / n * (w - before)]

        The optimizer's state stays as it is: neither momentum nor weight decay takes part.

        Args:
            closure: computes the gradients of the batch's loss at the present weights and returns the loss, a scalar.
                The steps use the gradients up.

        Returns:
            How often it was called: once more than there were steps, except when all `stop` were taken.
        """
        for passes in range(1, stop + 1):
            excess = closure() - limit
            if not bool(excess > 0):
                return passes
            self._step(excess)
        return stop

    @torch.no_grad()
    def _step(self, excess: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            weights: list[torch.Tensor] = [p for p in group["params"] if p.grad is not None]
            if weights:
                slopes: list[torch.Tensor] = [p.grad for p in weights]  # type: ignore[misc]  # no None among them
                torch._foreach_mul_(slopes, excess)
                moved = torch._foreach_sub(weights, [self.before[p] for p in weights])
                torch._foreach_add_(slopes, moved, alpha=self.pull)
                torch._foreach_add_(weights, slopes, alpha=-self.zeta * group["lr"])


class ISGD(Method):
    """Give batches with a high loss extra steps. Everything else is left to the optimizer.

    The losses are those of the batches alone, without penalties. The queue begins anew with batches of another size,
    which are other batches, and with weights that were drawn again; a change of structure leaves it as it is.
    """

    def __init__(self, config: schema.optimizer.ISGD) -> None:
        self.config = config
        self.losses: LossQueue | None = None
        self.batch_size = 0  # of the losses
        self.accelerated = self.passes = 0  # in this epoch: batches that got extra steps, and passes for these

    def before_training(self, run: Run) -> None:
        if run.precision.dtype is torch.float16:  # where a device decides that: precision.dtype=auto, precision=auto
            raise UserError(
                f"optimizer=isgd with precision={run.config.precision.name} in float16: its extra steps have no loss "
                "scale of their own; precision=bf16 works"
            )
        if self.losses is not None:  # from a checkpoint
            self.losses.losses = self.losses.losses.to(run.device)
        if run.config.data.order != "cycle":
            log.warning(
                "optimizer=isgd: data.order=%s draws other batches in every epoch, whose losses compare less; "
                "data.order=cycle keeps them",
                run.config.data.order,
            )

    def before_epoch(self, run: Run) -> None:
        self.accelerated = self.passes = 0

    def step(self, run: Run, closure: Closure) -> bool | None:
        limit = self._queue(run).exceeded_by(run.loss)
        if limit is None:
            return None
        subproblem = Subproblem(run.optimizer, self.config.eps, self.config.zeta)
        if not run.precision.step(run.optimizer):
            return False
        with kept_buffers(run.model):
            self.passes += subproblem.solve(lambda: closure(alone=True), limit, self.config.stop)
        self.accelerated += 1
        return True

    def after_epoch(self, run: Run) -> dict[str, float]:
        if run.redrawn == run.epoch:
            self.losses = None
        return {"accelerated_batches": self.accelerated, "extra_passes": self.passes}

    def state_dict(self) -> dict[str, Any]:
        if self.losses is None:
            return {}
        return {"losses": self.losses.losses, "count": self.losses.count, "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.losses = LossQueue(len(state["losses"]), self.config.sigmas)
            self.losses.losses.copy_(state["losses"])
            self.losses.count, self.batch_size = state["count"], state["batch_size"]

    def _queue(self, run: Run) -> LossQueue:
        if self.losses is None or self.batch_size != run.batch_size:
            batches = -(-len(run.data.train) // run.batch_size)
            self.losses, self.batch_size = LossQueue(batches, self.config.sigmas, run.device), run.batch_size
        return self.losses


def build_method(config: schema.optimizer.ISGD) -> ISGD:
    return ISGD(config)
