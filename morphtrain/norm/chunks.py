"""Batch norm of each chunk of a batch by its own statistics: forward and backward of ghost norm.

`Normalise` takes all chunks of a batch at once. On a CPU in channels_last `NormaliseByChunk` is faster: torch's own
kernel takes them one by one without copying, and a chunk stays in the cache between two reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from morphtrain.morph import exact

Chunks = list[tuple[int, int]]  # (how many, samples in each), in the order of the batch
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of a batch, and of weight and bias by chunk: (K, C)


def split(samples: int, ghost_batch_size: int, values: int) -> Chunks:
    """The chunks of a batch of `samples` with `values` numbers per channel each; a last one of one number is merged."""
    full, rest = divmod(samples, ghost_batch_size)
    if full and rest * values == 1:
        full, rest = full - 1, ghost_batch_size + 1
    return [(number, size) for number, size in ((full, ghost_batch_size), (1, rest)) if number and size]


class Normalise(torch.autograd.Function):
    """(chunk - mean) / deviation * `weight` + `bias` for each chunk; also returns means and variances (K, C).

    (B, C, H, W) -> the same, in the same memory format; the variances are unbiased. Computed in 32 bits or more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        chunks: Chunks,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output, means, variances = _forward(x, weight, bias, chunks, eps)
        deviations = (variances + eps).rsqrt()  # inverse ones
        ctx.save_for_backward(x, weight, means, deviations)
        ctx.chunks, ctx.has_bias = chunks, bias is not None
        parts = variances.split([number for number, _ in chunks])
        counts = [size * x.shape[2] * x.shape[3] for _, size in chunks]
        unbiased = torch.cat([part * (count / (count - 1)) for part, count in zip(parts, counts, strict=True)])
        ctx.mark_non_differentiable(means, unbiased)
        return output, means, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """dL/dx = w/sd * (g - mean(g) - x' * mean(g * x')), with the means over a chunk and x' = (x - mean) / sd."""
        x, weight, means, deviations = ctx.saved_tensors
        grad_x, grad_weights, grad_biases = _backward(grad, x, weight, means, deviations, ctx.chunks)
        grad_weight = None if weight is None else grad_weights.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_biases.sum(0) if ctx.has_bias else None, None, None


def is_fast_by_chunk(x: torch.Tensor) -> bool:
    """Whether torch's own batch norm takes each chunk without copying, on a device where many calls cost little."""
    return x.device.type == "cpu" and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)


class NormaliseByChunk(torch.autograd.Function):
    """Batch norm of one chunk after the other by torch's own kernel, which also updates the `running` statistics.

    (B, C, H, W) -> the same, in the same memory format. Computed in 32 bits or more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        sizes: Sequence[int],
        momenta: Sequence[float],
        running: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> torch.Tensor:
        output = torch.empty_like(x)
        means, deviations = exact(x.new_empty(2, len(sizes), x.shape[1]))  # deviations are inverse
        tracked = [exact(statistic) for statistic in running or ()]
        affine = [None if tensor is None else exact(tensor) for tensor in (weight, bias)]
        norm = torch.ops.aten.native_batch_norm.out
        parts = zip(x.split(sizes), output.split(sizes), momenta, means.unbind(), deviations.unbind(), strict=True)
        for part, out, momentum, mean, deviation in parts:
            wide = out if out.dtype == means.dtype else torch.empty_like(out, dtype=means.dtype)
            saved = {"save_mean": mean, "save_invstd": deviation}
            norm(exact(part), *affine, *(tracked or (None, None)), True, momentum, eps, out=wide, **saved)
            if wide is not out:
                out.copy_(wide)
        for statistic, new in zip(running or (), tracked, strict=True):
            if new is not statistic:
                statistic.copy_(new)
        ctx.save_for_backward(x, weight, means, deviations)
        ctx.sizes, ctx.has_bias = sizes, bias is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, means, deviations = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        slopes, totals = [], []
        scale = None if weight is None else exact(weight)
        tensors = (tensor.split(ctx.sizes) for tensor in (grad, x, grad_x))
        for g, part, out, mean, deviation in zip(*tensors, means.unbind(), deviations.unbind(), strict=True):
            new, slope, total = torch.ops.aten.native_batch_norm_backward(
                exact(g), exact(part), scale, None, None, mean, deviation, True, 0.0, [True, True, True]
            )
            out.copy_(new)
            slopes.append(slope)
            totals.append(total)
        grad_weight = None if weight is None else torch.stack(slopes).sum(0).to(weight.dtype)
        return grad_x, grad_weight, torch.stack(totals).sum(0) if ctx.has_bias else None, None, None, None, None


def _forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, chunks: Chunks, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and mean and biased variance of every chunk, (K, C)."""
    outputs, means, variances = [], [], []
    for part in _parts(x, chunks):  # the full chunks, then perhaps a shorter last one
        count = part.numel() // (part.shape[0] * part.shape[2])
        mean = _sum(part) / count  # (K, 1, C, 1, 1)
        squares = F.mse_loss(part, mean.expand_as(part), reduction="none")  # of the distance to the mean, in one pass
        variance = _sum(squares) / count
        scale, shift = _scale_and_shift(mean, variance, _spread(weight), _spread(bias), eps)
        output = torch.addcmul(shift, part, scale, out=squares)
        outputs.append(output.flatten(0, 1).to(x.dtype))
        means.append(mean)
        variances.append(variance)
    return _joined(outputs, x), torch.cat(means).flatten(1), torch.cat(variances).flatten(1)


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    means: torch.Tensor,
    deviations: torch.Tensor,
    chunks: Chunks,
) -> Grads:
    grads, grad_weights, grad_biases = [], [], []
    numbers = [number for number, _ in chunks]
    statistics = (s[:, None, :, None, None].split(numbers) for s in (means, deviations))
    spread = _spread(weight)
    for part, g, mean, deviation in zip(_parts(x, chunks), _parts(grad, chunks), *statistics, strict=True):
        count = part.numel() // (part.shape[0] * part.shape[2])
        products = g * part
        total = _sum(g)  # (K, 1, C, 1, 1)
        slope = deviation * (_sum(products) - mean * total)  # the sum of g * x'
        scale = deviation if spread is None else deviation * spread
        pull = -scale * deviation * slope / count
        shift = -scale * total / count - pull * mean
        grad_part = torch.addcmul(shift, part, pull, out=products).addcmul_(g, scale)
        grads.append(grad_part.flatten(0, 1).to(x.dtype))
        grad_weights.append(slope)
        grad_biases.append(total)
    return _joined(grads, x), torch.cat(grad_weights).flatten(1), torch.cat(grad_biases).flatten(1)


def _scale_and_shift(
    mean: torch.Tensor, variance: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x * scale + shift` is `x` normalised."""
    deviation = (variance + eps).rsqrt()  # inverse
    scale = deviation if weight is None else deviation * weight
    return scale, -scale * mean if bias is None else torch.addcmul(bias, scale, mean, value=-1)


def _parts(x: torch.Tensor, chunks: Chunks) -> Iterator[torch.Tensor]:
    """(B, C, H, W) -> views (K, G, C, H, W) of 32 bits or more, one for each size of chunks."""
    for (number, size), part in zip(chunks, x.split([number * size for number, size in chunks]), strict=True):
        yield exact(part.unflatten(0, (number, size)))


def _sum(x: torch.Tensor) -> torch.Tensor:
    """(K, G, C, H, W) -> (K, 1, C, 1, 1); space first, which is faster and no less exact."""
    return x.sum((3, 4), keepdim=True).sum(1, keepdim=True)


def _spread(channels: torch.Tensor | None) -> torch.Tensor | None:
    """(C,) -> (1, 1, C, 1, 1), of 32 bits or more."""
    return None if channels is None else exact(channels).view(1, 1, -1, 1, 1)


def _joined(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The parts as one batch in the memory format of `like`; that of a single-sample part is ambiguous to `cat`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), out=torch.empty_like(like))
