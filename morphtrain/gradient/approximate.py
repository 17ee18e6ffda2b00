"""Approximate gradients of convolutions' weights (Wang, Nelaturu and Amarasinghe 2019, arXiv 1908.05460).

    with ApproximateGradients("top1"):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()

Around the backward pass of a network that computes layers again in it belongs `morphtrain.layer_calls.seen_again`.

The gradient of a layer's weight is no part of the gradients of the layers before it. So it can be something cheaper in
some layers of some batches, while everything else learns as it would.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from morphtrain import schema
from morphtrain.contracts import Batch
from morphtrain.errors import UserError
from morphtrain.gradient.order import Order
from morphtrain.gradient.patches import Geometry, geometry, weight_gradient
from morphtrain.layer_calls import CONVOLUTIONS, Layer, LayerCalls
from morphtrain.method import Method
from morphtrain.state import GRADIENTS, Run, derived_seed

# The input (where it was kept), the gradient of the output and the weight of a layer -> a gradient like the weight.
Rule = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


class ApproximateGradients(LayerCalls):
    """A context of forward passes whose backward passes give some convolutions an approximate gradient of the weight.

    Of the convolutions with a kernel larger than 1, counted in the order of their calls from where the context is
    entered, every n-th is chosen. What it computes and the gradient of its input are bit by bit those without the
    context; the gradient of its bias is exact up to rounding. Strides, padding, dilation, groups, memory formats and
    `torch.autocast` are those of the layer.

    `zero` leaves a gradient of zeros, not none: momentum and weight decay go on, penalties find a gradient to add to,
    and all processes of a run have the same gradients to average. It is never computed.

    Args:
        kind: zero, top1 or random; with the last two, each image and output channel adds a patch of the input times the
            sum of the channel's gradient: the patch where that is largest, or one drawn by chance.
        every: n; 1 chooses all.
        generator: of what is drawn, on the device of the network; None: torch's own.

    Attributes:
        order: of the calls of such convolutions since the context was entered.
        trained: the numbers of those whose weights get a gradient.
    """

    def __init__(self, kind: str = "zero", every: int = 2, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.kind, self.every, self.generator = kind, every, generator
        self.order, self.trained = Order(), set[int]()

    def __enter__(self) -> ApproximateGradients:
        self.order, self.trained = Order(), set()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @property
    def chosen(self) -> int:
        """How many layers were chosen since the context was entered."""
        return sum(map(self._is_chosen, self.trained))

    def call(
        self,
        layer: Layer,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *rest: Any,
        **keywords: Any,
    ) -> torch.Tensor:
        if not self._chooses(layer, x, weight):
            return layer(x, weight, bias, *rest, **keywords)
        # Without what needs no gradient, the layer's own backward pass leaves out what that would take.
        out = layer(x, weight.detach(), None if bias is None else bias.detach(), *rest, **keywords)
        rule = zeros if self.kind == "zero" else self._rule(geometry(weight, *rest, **keywords))
        kept = None if self.kind == "zero" else x.detach()
        own: torch.Tensor = OwnWeightGradient.apply(out, weight, bias, kept, rule)
        return own

    def _chooses(self, layer: Layer, x: torch.Tensor, weight: torch.Tensor) -> bool:
        if layer not in CONVOLUTIONS or max(weight.shape[2:]) == 1 or x.dim() != weight.dim():
            return False
        number = self._number(weight)
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return False
        self.trained.add(number)
        return self._is_chosen(number)

    def _is_chosen(self, number: int) -> bool:
        return number % self.every == 0

    def _number(self, weight: torch.Tensor) -> int:
        if not self.is_again:
            return self.order.number(weight)
        first, *others = self.order.numbers_again(weight)
        if any(self._is_chosen(other) != self._is_chosen(first) for other in others):
            raise UserError(
                f"gradient.every={self.every}: the network uses a weight several times, and calls layers again in its "
                "backward pass (torch.utils.checkpoint), where one call is like the other; gradient.every=1 works"
            )
        return first

    def _rule(self, where: Geometry) -> Rule:
        def rule(x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            channels = grad.flatten(2)  # (B, O, places)
            if self.kind == "top1":
                positions = channels.abs().argmax(2)
            else:
                positions = torch.randint(
                    channels.shape[2], channels.shape[:2], generator=self.generator, device=grad.device
                )
            # What autocast has given the layer is of the type of its output.
            found = weight_gradient(x.to(grad.dtype), positions, channels.sum(2), len(weight), where)
            return torch.empty_like(weight).copy_(found)

        return rule


def zeros(x: torch.Tensor | None, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A gradient of zeros."""
    return torch.zeros_like(weight)


class OwnWeightGradient(torch.autograd.Function):
    """A layer's output, which gives the weight a gradient by a rule, and the bias the one that a convolution gives it.

    The output has been computed without their gradients. It is taken over in place: what follows may overwrite it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        x: torch.Tensor | None,
        rule: Rule,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rule, ctx.bias_dtype = rule, None if bias is None else bias.dtype
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        bias = None
        if ctx.needs_input_grad[2]:
            bias = grad.sum((0, *range(2, grad.dim())), dtype=ctx.bias_dtype)
        return grad, ctx.rule(x, grad, weight), bias, None, None


class Approximate(Method):
    """The method as hooks of the training loop; `ApproximateGradients` is its functional form.

    Whether a batch is one of its `share` is drawn once for each step, whatever passes the step takes in whatever
    process; positions in its own images each process draws by itself.
    """

    def __init__(self, config: schema.gradient.Approximate) -> None:
        self.config = config
        self._batches = random.Random()
        self._positions: torch.Generator | None = None
        self._pass: ApproximateGradients | None = None  # of this step; None: its gradients are exact
        self._passed = False  # whether this process had images for it
        self._steps = 0  # of this epoch
        self._approximated: set[int] = set()  # the numbers of those in which a gradient was approximate

    def before_epoch(self, run: Run) -> None:
        self._batches = random.Random(derived_seed(run.config.seed, run.epoch, GRADIENTS))
        self._positions = torch.Generator(run.device).manual_seed(run.own_seed(GRADIENTS))
        self._steps, self._approximated = 0, set()

    def before_forward(self, run: Run, batch: Batch) -> None:
        self._pass, self._passed = None, False
        if self._batches.random() < self.config.share:
            self._pass = ApproximateGradients(self.config.kind, self.config.every, self._positions)
        self._steps += 1

    def around_forward(self, run: Run) -> AbstractContextManager[Any]:
        self._passed = True
        return self._pass or nullcontext()

    def after_backward(self, run: Run) -> None:
        if self._pass is None or not self._passed:
            return
        if self._pass.chosen:
            self._approximated.add(self._steps)
        elif not any(change["event"] for change in run.changes):  # what pruning removes is no mistake
            raise UserError(self._why_none(self._pass))

    def _why_none(self, approximate: ApproximateGradients) -> str:
        calls, every = approximate.order.calls, self.config.every
        if calls and not approximate.trained:
            return (
                "gradient=approximate: all convolutions with a kernel above 1 are frozen, so that none has a gradient; "
                "gradient=none works"
            )
        if calls < every:
            return (
                f"gradient.every={every}: the network calls fewer convolutions with a kernel above 1, so "
                "that none is chosen; a smaller value, or gradient=none, works"
            )
        return f"gradient.every={every}: all convolutions that it chooses are frozen; gradient.every=1 works"

    def after_epoch(self, run: Run) -> dict[str, float]:
        return {"approximated_share": len(self._approximated) / self._steps}


def build(config: schema.gradient.Approximate) -> Approximate:
    return Approximate(config)
