"""Ghost batch norm (Hoffer et al. 2017, arXiv 1705.08741): batch norm over parts of a large batch.

to_ghost(model, ghost_batch_size=32)    # before or after the optimizer is made: the parameters stay
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.norm.chunks import Normalise, NormaliseByChunk, is_fast_by_chunk, split


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that, in training, normalises every `ghost_batch_size` samples with their own statistics.

    (B, C, H, W) -> the same, in the same memory format. The result (outputs, gradients, running statistics,
    `num_batches_tracked`) is that of `nn.BatchNorm2d` called on one chunk after the other, in one pass. The last chunk
    holds the rest of the batch; if that is a single value per channel, which has no variance, it joins the chunk before
    it. Evaluation is plain batch norm, and the state dict is that of `nn.BatchNorm2d`. In lower precision the
    statistics are computed in 32 bits.

    Args:
        num_features: C.
        ghost_batch_size: samples in a chunk; a batch of at most that many is one chunk.
        options: those of `nn.BatchNorm2d`.

    Raises:
        ValueError: in training, if a chunk has a single value per channel, such as one sample of 1x1.
    """

    per_channel = True  # see `morphtrain.morph.trace.recording.Tracer`

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
        if is_fast_by_chunk(input):
            return self._by_chunk(input, [size for number, size in chunks for _ in range(number)])
        output, means, variances = Normalise.apply(input, self.weight, self.bias, chunks, self.eps)
        if self.track_running_stats:
            self._track(means, variances)
        return output

    def _by_chunk(self, input: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        running, momenta = None, [0.0] * len(sizes)
        if self.track_running_stats:
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            running = (self.running_mean, self.running_var)
            if self.momentum is not None:
                momenta = [self.momentum] * len(sizes)
            else:  # the mean of all chunks ever seen
                seen = int(self.num_batches_tracked)
                momenta = [1 / (seen + number) for number in range(1, len(sizes) + 1)]
            self.num_batches_tracked += len(sizes)
        output: torch.Tensor = NormaliseByChunk.apply(input, self.weight, self.bias, sizes, momenta, running, self.eps)
        return output

    @torch.no_grad()
    def _track(self, means: torch.Tensor, variances: torch.Tensor) -> None:
        """Update the running statistics by all chunks at once; `means` and unbiased `variances` are (K, C)."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        number = len(means)
        self.num_batches_tracked += number
        keep: torch.Tensor | float
        if self.momentum is None:  # the mean of all chunks ever seen
            weights = means.new_ones(()) / self.num_batches_tracked
            keep = 1 - number * weights
        else:
            later = torch.arange(number - 1, -1, -1, dtype=means.dtype, device=means.device)  # updates after each one
            weights = self.momentum * (1 - self.momentum) ** later[:, None]
            keep = (1 - self.momentum) ** number
        for running, new in ((self.running_mean, means), (self.running_var, variances)):
            running.mul_(keep).add_((weights * new).sum(0))

    def extra_repr(self) -> str:
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, ghost_batch_size={self.ghost_batch_size}"


def to_ghost(model: nn.Module, ghost_batch_size: int) -> int:
    """Turn every `nn.BatchNorm2d` of `model` into a `GhostBatchNorm2d`, in place, and return how many there are.

    As with torch's lazy modules, the modules change class in place: parameters, buffers, modes, hooks and references to
    the modules are kept. Ghost norms get the new size; other subclasses of `nn.BatchNorm2d` are left alone.
    """
    norms = [module for module in model.modules() if type(module) in (nn.BatchNorm2d, GhostBatchNorm2d)]
    for norm in norms:
        norm.__class__ = GhostBatchNorm2d
        norm.ghost_batch_size = ghost_batch_size  # type: ignore[assignment]  # an int, not a module
    return len(norms)


def build(config: schema.norm.GhostNorm, model: nn.Module) -> None:
    if to_ghost(model, config.ghost_batch_size) == 0:
        raise UserError("norm=ghost: the model has no BatchNorm2d; choose norm=batch, or a model with batch norm")
