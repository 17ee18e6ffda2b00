"""Sparse gradients at the outputs of convolutions (Ye et al. 2019, arXiv 1908.00173; "Pruning Activation Gradients").

    with SparseGradients(p=0.9) as sparse:
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    zeros, macs_saved = sparse.tally.shares()

Around the backward pass of a network that computes layers again in it belongs `morphtrain.layer_calls.seen_again`.

Most of these gradients are small. Those below a threshold become zero or the threshold, by a chance that keeps their
mean. Sparse hardware could leave the zeros out; dense kernels do not.
"""

from __future__ import annotations

import math
import statistics
from contextlib import AbstractContextManager
from typing import Any

import torch

from morphtrain import schema, world
from morphtrain.errors import UserError
from morphtrain.layer_calls import CONVOLUTIONS, TRANSPOSED, Layer, LayerCalls
from morphtrain.method import Method
from morphtrain.state import GRADIENTS, Run


@torch.no_grad()
def sparsified(gradient: torch.Tensor, p: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Set each entry below a threshold tau to 0, or to tau with its sign with probability |entry| / tau.

    tau is what the share `p` of normal numbers with mean 0 and the mean size of these is below: Phi^-1((1 + p) / 2) *
    sigma, with sigma = sqrt(pi / 2) * mean |entry| (section 3). The expectation is `gradient`.

    Args:
        gradient: any shape and memory format, which are those of the result.
        p: between 0 and 1.
        generator: on the device of `gradient`; None: torch's own.
    """
    exact = torch.promote_types(gradient.dtype, torch.float32)  # 16 bits would have too few chances to draw from
    sizes = gradient.abs()
    factor = -statistics.NormalDist().inv_cdf((1 - p) / 2) * math.sqrt(math.pi / 2)
    tau = (factor * sizes.mean(dtype=exact)).to(gradient.dtype)
    tau = tau + 0 * tau  # not a number if it is infinite: a loss scale has to find out that gradients have overflowed
    drawn = torch.empty_like(gradient, dtype=exact).uniform_(generator=generator) * tau
    return torch.where(sizes <= drawn, 0, torch.maximum(sizes, tau).copysign(gradient))


class Tally:
    """What sparse gradients hold, counted on their device; only `shares` waits for it.

    Attributes:
        entries: all there are.
        macs: multiply-accumulates of all backward passes.
    """

    def __init__(self) -> None:
        self.entries = self.macs = 0
        self._zeros: Any = 0
        self._saved: Any = 0

    def count(self, gradient: torch.Tensor, macs: int) -> None:
        """Add a gradient each of whose entries takes so many multiply-accumulates in the backward pass."""
        zeros = (gradient == 0).sum()
        self.entries += gradient.numel()
        self._zeros = self._zeros + zeros
        self._saved = self._saved + macs * zeros

    def shares(self) -> tuple[float, float]:
        """The share of zeros in the gradients, and that of all MACs of the backward passes that meet one of them.

        Both are of all processes.
        """
        counts = torch.tensor([self.entries, self.macs, int(self._zeros), int(self._saved)])
        world.sum_([counts])
        entries, macs, zeros, saved = counts.tolist()
        return zeros / max(1, entries), saved / max(1, macs)


class SparseGradients(LayerCalls):
    """A context of forward passes whose backward passes make the gradients at convolutions' outputs sparse.

    Args:
        p: see `sparsified`.
        generator: of what is drawn, on the device of the network; None: torch's own.
        tally: that counts zeros and MACs; None: a new one.
    """

    def __init__(self, p: float, generator: torch.Generator | None = None, tally: Tally | None = None) -> None:
        super().__init__()
        self.p, self.generator, self.tally = p, generator, tally or Tally()

    def __enter__(self) -> SparseGradients:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def call(
        self,
        layer: Layer,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *rest: Any,
        **keywords: Any,
    ) -> torch.Tensor:
        out = layer(x, weight, bias, *rest, **keywords)
        if not out.requires_grad:
            return out
        products = x.requires_grad + weight.requires_grad  # of the backward pass: for the input, and for the weight
        macs = products * math.prod(weight.shape[1:])  # of an entry of the output, or of a transposed layer's input
        of_layer = macs * (x if layer in TRANSPOSED else out).numel()

        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            self.tally.macs += of_layer  # here, as not every pass that makes a graph is followed by one through it
            if layer not in CONVOLUTIONS:
                return None
            sparse = sparsified(gradient, self.p, self.generator)
            self.tally.count(sparse, macs)
            return sparse

        out.register_hook(hook)
        return out


class SparseActivation(Method):
    """The method as hooks of the training loop; `SparseGradients` is its functional form."""

    def __init__(self, config: schema.gradient.SparseActivation) -> None:
        self.config = config
        self._generator: torch.Generator | None = None
        self._tally, self._passes = Tally(), 0  # of this epoch

    def before_epoch(self, run: Run) -> None:
        self._generator = torch.Generator(run.device).manual_seed(run.own_seed(GRADIENTS))
        self._tally, self._passes = Tally(), 0

    def around_forward(self, run: Run) -> AbstractContextManager[Any]:
        self._passes += 1
        return SparseGradients(self.config.p, self._generator, self._tally)

    def after_backward(self, run: Run) -> None:
        if run.epoch == 1 and self._passes and not self._tally.entries:
            raise UserError(
                "gradient=sparse_activation: the network has no convolution whose output gets a gradient; "
                "gradient=none works"
            )

    def after_epoch(self, run: Run) -> dict[str, float]:
        zeros, saved = self._tally.shares()
        return {"gradient_zeros": zeros, "gradient_macs_saved": saved}


def build(config: schema.gradient.SparseActivation) -> SparseActivation:
    return SparseActivation(config)
