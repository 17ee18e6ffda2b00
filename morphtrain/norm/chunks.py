"""Batch norm of each part of a batch by its own statistics: forward and backward of ghost norm.

The chunks of a batch are normalised all at once. On a CPU in channels_last they go through torch's own kernels, one by
one, since there are none for many chunks: memory is read less often where a few of them stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Chunks = list[tuple[int, int]]  # (how many, samples in each), in the order of the batch
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of a batch, and of weight and bias by chunk: (K, C)

WIDTH = 512  # sums over a channels_last chunk that are computed side by side: more would leave the first cache
TILE = 8 * 2**20  # bytes of a batch in channels_last that are read a second time while they are in a cache


def split(samples: int, ghost_batch_size: int, values: int) -> Chunks:
    """The chunks of a batch of `samples` with `values` numbers each in a channel."""
    full, rest = divmod(samples, ghost_batch_size)
    if full and rest * values == 1:
        full, rest = full - 1, ghost_batch_size + 1
    return [(number, size) for number, size in ((full, ghost_batch_size), (1, rest)) if number and size]


class Normalise(torch.autograd.Function):
    """Each chunk less its mean, over its deviation, times `weight`, plus `bias`; also means and variances (K, C).

    (B, C, H, W) -> the same, in the same memory format; the variances are unbiased. All is computed in 32 bits or more.
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
        forward = _forward_rows if _has_rows(x) else _forward
        output, means, variances = forward(x, weight, bias, chunks, eps)
        deviations = (variances + eps).rsqrt()  # their inverses
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
        backward = _backward_rows if _has_rows(x) else _backward
        grad_x, grad_weights, grad_biases = backward(grad, x, weight, means, deviations, ctx.chunks)
        grad_weight = None if weight is None else grad_weights.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_biases.sum(0) if ctx.has_bias else None, None, None


def _forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, chunks: Chunks, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and mean and biased variance of every chunk, (K, C)."""
    outputs, means, variances = [], [], []
    for part in _parts(x, chunks):  # one of full chunks, and perhaps the last one
        count = part.numel() // (part.shape[0] * part.shape[2])
        mean = _sum(part) / count  # (K, 1, C, 1, 1)
        squares = F.mse_loss(part, mean.expand_as(part), reduction="none")  # of the distance, in one pass
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


def _has_rows(x: torch.Tensor) -> bool:
    """Whether `_rows` are a view, on a device where going through the chunks one by one costs little."""
    return x.device.type == "cpu" and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)


def _forward_rows(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, chunks: Chunks, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_forward` of a batch that `_has_rows`."""
    output = torch.empty_like(x)
    tiles = _tiles(x, chunks)
    means, variances = [], []
    for part, out, (number, _) in zip(_split(x, tiles), _split(output, tiles), tiles, strict=True):
        rows = _rows(_exact(part), number)
        mean, variance = _moments(rows)
        scale, shift = _scale_and_shift(mean, variance, weight, bias, eps)
        torch.addcmul(shift, rows, scale, out=_rows(out, number))
        means.append(mean)
        variances.append(variance)
    return output, torch.cat(means).flatten(1), torch.cat(variances).flatten(1)


def _backward_rows(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    means: torch.Tensor,
    deviations: torch.Tensor,
    chunks: Chunks,
) -> Grads:
    grad_x = torch.empty_like(x)
    tiles = _tiles(x, chunks)
    slopes, totals = [], []
    parts = (_split(tensor, tiles) for tensor in (grad, x, grad_x))
    statistics = (s[:, None].split([number for number, _ in tiles]) for s in (means, deviations))
    for g_part, part, out, mean, deviation in zip(*parts, *statistics, strict=True):
        g, rows = _rows(_exact(g_part), len(mean)), _rows(_exact(part), len(mean))
        slope, total = _moments_of_gradient(g, rows, mean, deviation)
        scale = deviation if weight is None else deviation * weight  # (N, 1, C)
        share = scale / -rows.shape[1]
        pull = share * deviation * slope
        shift = torch.addcmul(share * total, pull, mean, value=-1)
        in_place = out.dtype == shift.dtype
        new = torch.addcmul(shift, rows, pull, out=_rows(out, len(mean)) if in_place else None).addcmul_(g, scale)
        if not in_place:
            _rows(out, len(mean)).copy_(new)
        slopes.append(slope)
        totals.append(total)
    return grad_x, torch.cat(slopes).flatten(1), torch.cat(totals).flatten(1)


def _moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (N, 1, C) of the columns of `rows` (N, R, C)."""
    found = [torch.batch_norm_update_stats(chunk, None, None, 0.0) for chunk in _wide(rows)]
    means, variances = (torch.stack(s).unflatten(1, (-1, rows.shape[2])) for s in zip(*found, strict=True))
    between, mean = torch.var_mean(means, 1, correction=0, keepdim=True)  # (N, S, C)
    return mean, variances.mean(1, keepdim=True) + between


def _moments_of_gradient(
    g: torch.Tensor, rows: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of g * x' and of g (N, 1, C) over `rows` (N, R, C) and their gradients `g`."""
    wide = _wide(rows)
    streams = wide[0].shape[1] // rows.shape[2]
    statistics = (s.flatten(1).repeat(1, streams) for s in (mean, deviation))
    found = [
        torch.ops.aten.native_batch_norm_backward(*pair, None, None, None, m, d, True, 0.0, [False, True, True])[1:]
        for *pair, m, d in zip(_wide(g), wide, *statistics, strict=True)
    ]
    slope, total = (torch.stack(s).unflatten(1, (streams, -1)).sum(1, keepdim=True) for s in zip(*found, strict=True))
    return slope, total


def _wide(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(N, R, C) -> N of (R / S, S * C, 1, 1): a column of every S-th row; the shorter a sum, the more exact it is."""
    number, count, channels = rows.shape
    streams = math.gcd(count, 2 ** (max(WIDTH // channels, 1).bit_length() - 1))
    return rows.reshape(number, count // streams, streams * channels, 1, 1).unbind()


def _scale_and_shift(
    mean: torch.Tensor, variance: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x * scale + shift` is `x` normalised."""
    deviation = (variance + eps).rsqrt()  # its inverse
    scale = deviation if weight is None else deviation * weight
    return scale, -scale * mean if bias is None else torch.addcmul(bias, scale, mean, value=-1)


def _tiles(x: torch.Tensor, chunks: Chunks) -> Chunks:
    """`chunks` in groups of at most TILE bytes, or single ones: what is small is done for all of a group at once."""
    result = []
    for number, size in chunks:
        most = max(1, TILE // (size * x[0].nbytes))
        result += [(min(most, number - done), size) for done in range(0, number, most)]
    return result


def _split(x: torch.Tensor, chunks: Chunks) -> tuple[torch.Tensor, ...]:
    """The samples of each entry of `chunks`."""
    return x.split([number * size for number, size in chunks])


def _rows(x: torch.Tensor, number: int) -> torch.Tensor:
    """(N * G, C, H, W) -> (N, G * H * W, C); in channels_last a view."""
    return x.permute(0, 2, 3, 1).reshape(number, -1, x.shape[1])


def _exact(x: torch.Tensor) -> torch.Tensor:
    """In 32 bits or more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _parts(x: torch.Tensor, chunks: Chunks) -> Iterator[torch.Tensor]:
    """(B, C, H, W) -> views (K, G, C, H, W) of 32 bits or more, one for each size of chunks."""
    for (number, size), part in zip(chunks, _split(x, chunks), strict=True):
        yield _exact(part.unflatten(0, (number, size)))


def _sum(x: torch.Tensor) -> torch.Tensor:
    """(K, G, C, H, W) -> (K, 1, C, 1, 1); space first, which is faster and no less exact."""
    return x.sum((3, 4), keepdim=True).sum(1, keepdim=True)


def _spread(channels: torch.Tensor | None) -> torch.Tensor | None:
    """(C,) -> (1, 1, C, 1, 1)"""
    return None if channels is None else channels.view(1, 1, -1, 1, 1)


def _joined(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The parts as one batch in the memory format of `like`; of a single sample nobody can tell which it is in."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), out=torch.empty_like(like))
