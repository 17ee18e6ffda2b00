"""Ghost batch norm (Hoffer et al. 2017, arXiv 1705.08741): batch norm over parts of a large batch.

to_ghost(model, ghost_batch_size=32)    # before or after the optimizer is made: the parameters stay
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from morphtrain import schema
from morphtrain.errors import UserError

Chunks = list[tuple[int, int]]  # (how many, samples in each), in the order of the batch


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that, in training, normalises every `ghost_batch_size` samples by their own statistics.

    (B, C, H, W) -> the same, in the same memory format. The result (outputs, gradients, running statistics,
    `num_batches_tracked`) is that of `nn.BatchNorm2d` called on one chunk after the other, in one pass. The last chunk
    has what is left of the batch; if that is a single value a channel, which has no variance, it joins the chunk before
    it. Evaluation is plain batch norm, and the state dict is that of `nn.BatchNorm2d`. In lower precision the
    statistics are computed in 32 bits.

    Args:
        num_features: C.
        ghost_batch_size: samples in a chunk; a batch of at most that many is one chunk.
        options: those of `nn.BatchNorm2d`.

    Raises:
        ValueError: in training, if a chunk has a single value a channel, as one sample of 1x1.
    """

    per_channel = True  # see `morphtrain.morph.trace.Tracer`

    def __init__(self, num_features: int, ghost_batch_size: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.ghost_batch_size = ghost_batch_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        values = input.shape[2] * input.shape[3]
        chunks = split(len(input), self.ghost_batch_size, values)
        if sum(number for number, _ in chunks) == 1:
            return super().forward(input)
        if any(size * values == 1 for _, size in chunks):
            raise ValueError(
                f"Expected more than 1 value per channel when training, got chunks of {self.ghost_batch_size} sample "
                f"of input size {list(input.shape)}"
            )
        output, means, variances = _Normalise.apply(input, self.weight, self.bias, chunks, self.eps)
        if self.track_running_stats:
            self._track(means, variances)
        return output

    @torch.no_grad()
    def _track(self, means: torch.Tensor, variances: torch.Tensor) -> None:
        """All chunks' steps of the running statistics at once; `means` and unbiased `variances` are (K, C)."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        number = len(means)
        self.num_batches_tracked += number
        keep: torch.Tensor | float
        if self.momentum is None:  # the mean of all chunks that were ever seen
            weights = means.new_ones(()) / self.num_batches_tracked
            keep = 1 - number * weights
        else:
            later = torch.arange(number - 1, -1, -1, dtype=means.dtype, device=means.device)  # steps behind each one
            weights = self.momentum * (1 - self.momentum) ** later[:, None]
            keep = (1 - self.momentum) ** number
        for running, new in ((self.running_mean, means), (self.running_var, variances)):
            running.mul_(keep).add_((weights * new).sum(0))

    def extra_repr(self) -> str:
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, ghost_batch_size={self.ghost_batch_size}"


def split(samples: int, ghost_batch_size: int, values: int) -> Chunks:
    """The chunks of a batch of `samples` with `values` numbers each in a channel."""
    full, rest = divmod(samples, ghost_batch_size)
    if full and rest * values == 1:
        full, rest = full - 1, ghost_batch_size + 1
    return [(number, size) for number, size in ((full, ghost_batch_size), (1, rest)) if number and size]


class _Normalise(torch.autograd.Function):
    """Each chunk less its mean, over its deviation, times `weight`, plus `bias`; also means and variances (K, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        chunks: Chunks,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outputs, means, deviations, variances = [], [], [], []
        for part in _parts(x, chunks):  # one of full chunks, and perhaps the last one
            count = part.numel() // (part.shape[0] * part.shape[2])
            mean = _sum(part) / count  # (K, 1, C, 1, 1)
            squares = F.mse_loss(part, mean.expand_as(part), reduction="none")  # of the distance, in one pass
            variance = _sum(squares) / count
            deviation = (variance + eps).rsqrt()  # its inverse
            scale = deviation if weight is None else deviation * _spread(weight)
            shift = -scale * mean if bias is None else _spread(bias) - scale * mean
            output = torch.addcmul(shift, part, scale, out=squares)
            outputs.append(output.flatten(0, 1).to(x.dtype))
            means.append(mean)
            deviations.append(deviation)
            variances.append(variance * (count / (count - 1)))
        ctx.save_for_backward(x, weight, torch.cat(means), torch.cat(deviations))
        ctx.chunks, ctx.has_bias = chunks, bias is not None
        statistics = torch.cat(means).flatten(1), torch.cat(variances).flatten(1)
        ctx.mark_non_differentiable(*statistics)
        return _joined(outputs, x), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """dL/dx = w/sd * (g - mean(g) - x' * mean(g * x')), with the means over a chunk and x' = (x - mean) / sd."""
        x, weight, means, deviations = ctx.saved_tensors
        numbers = [number for number, _ in ctx.chunks]
        grads, grad_weights, grad_biases = [], [], []
        for part, g, mean, deviation in zip(
            _parts(x, ctx.chunks),
            _parts(grad, ctx.chunks),
            means.split(numbers),
            deviations.split(numbers),
            strict=True,
        ):
            count = part.numel() // (part.shape[0] * part.shape[2])
            products = g * part
            total = _sum(g)  # (K, 1, C, 1, 1)
            slope = deviation * (_sum(products) - mean * total)  # the sum of g * x'
            scale = deviation if weight is None else deviation * _spread(weight)
            pull = -scale * deviation * slope / count
            shift = -scale * total / count - pull * mean
            grad_part = torch.addcmul(shift, part, pull, out=products).addcmul_(g, scale)
            grads.append(grad_part.flatten(0, 1).to(x.dtype))
            grad_weights.append(slope)
            grad_biases.append(total)
        grad_weight = None if weight is None else torch.cat(grad_weights).sum(0).flatten().to(weight.dtype)
        grad_bias = torch.cat(grad_biases).sum(0).flatten() if ctx.has_bias else None
        return _joined(grads, x), grad_weight, grad_bias, None, None


def _parts(x: torch.Tensor, chunks: Chunks) -> Iterator[torch.Tensor]:
    """(B, C, H, W) -> views (K, G, C, H, W) of 32 bits or more, one for each size of chunks."""
    for (number, size), part in zip(chunks, x.split([number * size for number, size in chunks]), strict=True):
        yield part.unflatten(0, (number, size)).to(torch.promote_types(x.dtype, torch.float32))


def _sum(x: torch.Tensor) -> torch.Tensor:
    """(K, G, C, H, W) -> (K, 1, C, 1, 1); space first, which is faster and no less exact."""
    return x.sum((3, 4), keepdim=True).sum(1, keepdim=True)


def _spread(channels: torch.Tensor) -> torch.Tensor:
    """(C,) -> (1, 1, C, 1, 1)"""
    return channels.view(1, 1, -1, 1, 1)


def _joined(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The parts as one batch in the memory format of `like`; of a single sample nobody can tell which it is in."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), out=torch.empty_like(like))


def to_ghost(model: nn.Module, ghost_batch_size: int) -> int:
    """Turn every `nn.BatchNorm2d` of `model` into a `GhostBatchNorm2d`, in place, and return how many there are.

    As torch's lazy modules do it, the modules become instances of the other class: parameters, buffers, modes, hooks
    and whatever refers to the modules stay as they are. Ghost norms get the new size; other subclasses are left alone.
    """
    norms = [module for module in model.modules() if type(module) in (nn.BatchNorm2d, GhostBatchNorm2d)]
    for norm in norms:
        norm.__class__ = GhostBatchNorm2d
        norm.ghost_batch_size = ghost_batch_size  # type: ignore[assignment]  # an int, no module
    return len(norms)


def build(config: schema.GhostNorm, model: nn.Module) -> None:
    if to_ghost(model, config.ghost_batch_size) == 0:
        raise UserError("norm=ghost: the model has no BatchNorm2d; choose norm=batch, or a model with batch norm")
