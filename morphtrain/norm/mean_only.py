"""Mean-only batch norm (Salimans and Kingma 2016, arXiv 1602.07868, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class MeanOnlyBatchNorm(_BatchNorm):
    """Batch norm that subtracts the mean of each channel, adds a learnt bias, and divides by nothing.

    (B, C, ...) -> the same, of any number of further dimensions. In evaluation it subtracts the running mean, which
    follows the batches' means as that of `nn.BatchNorm2d` does. There is no scale and no running variance: both are
    None. In lower precision the mean is computed in 32 bits.

    Args:
        num_features: C.
        momentum: of the running mean; None: the mean of all batches.
        track_running_stats: False: the batch's own mean in evaluation, too.

    Raises:
        ValueError: in training, for a single value per channel, of which nothing would be left.
    """

    per_channel = True  # see `morphtrain.morph.trace.recording.Tracer`

    def __init__(self, num_features: int, momentum: float | None = 0.1, track_running_stats: bool = True) -> None:
        super().__init__(num_features, momentum=momentum, track_running_stats=track_running_stats)
        self.register_parameter("weight", None)
        self.register_buffer("running_var", None)

    def reset_running_stats(self) -> None:
        """Forget the batches seen."""
        if self.running_mean is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Forget the batches seen, and the bias."""
        self.reset_running_stats()
        nn.init.zeros_(self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.numel() == input.shape[1] and self.training:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        if self.training or self.running_mean is None:
            exact = torch.promote_types(input.dtype, torch.float32)
            mean = input.mean([0, *range(2, input.dim())], dtype=exact)
            if self.training and self.running_mean is not None:
                self._track(mean.detach())
        else:
            mean = self.running_mean
        shift = (self.bias - mean).view(-1, *[1] * (input.dim() - 2))
        return (input + shift).to(input.dtype)

    def _track(self, mean: torch.Tensor) -> None:
        assert self.running_mean is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.to(mean) if self.momentum is None else self.momentum
        self.running_mean.add_((mean - self.running_mean) * share)

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}, track_running_stats={self.track_running_stats}"


def to_mean_only(norm: Any) -> None:
    """Turn a batch norm of torch's into a new mean-only one, in place: settings, mode, hooks and references stay."""
    like = next((t for t in (norm.bias, norm.running_mean) if t is not None), torch.zeros(()))
    norm.__class__ = MeanOnlyBatchNorm
    norm.affine, norm.weight, norm.running_var = True, None, None
    norm.bias = nn.Parameter(like.new_zeros(norm.num_features), getattr(norm.bias, "requires_grad", True))
    norm.reset_parameters()
