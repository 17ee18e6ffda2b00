"""How tensors lie in memory: channels first (torch's contiguous) or channels last."""

from __future__ import annotations

import torch
from torch import nn

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions


def format_of(tensor: torch.Tensor) -> torch.memory_format:
    """The memory format of a tensor (B, C, H, W), by its strides; channels_last_3d for five dimensions.

    With a single channel or a single pixel a tensor is contiguous in both formats. The strides of the dimensions of
    size 1 decide then, as they do in torch's kernels. With one value per sample the formats are indistinguishable, and
    the result is `torch.contiguous_format`.
    """
    last = LAST.get(tensor.dim())
    if last is None or not tensor.is_contiguous(memory_format=last) or tensor.shape[1:].numel() == 1:
        return torch.contiguous_format
    channels_are_last = tensor.stride(1) == 1 and tensor.stride(-1) == tensor.shape[1]
    return last if channels_are_last else torch.contiguous_format


def format_of_model(model: nn.Module) -> torch.memory_format:
    """channels_last if all two-dimensional kernels of the model are in it, otherwise `torch.contiguous_format`."""
    kernels = [p for p in model.parameters() if p.dim() == 4 and p.shape[1:].numel() > 1]
    last = bool(kernels) and all(format_of(kernel) is torch.channels_last for kernel in kernels)
    return torch.channels_last if last else torch.contiguous_format
