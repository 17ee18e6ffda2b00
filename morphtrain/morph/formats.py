"""How tensors lie in memory: channels first (torch's contiguous) or channels last."""

from __future__ import annotations

import torch
from torch import nn

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions


def format_of(tensor: torch.Tensor) -> torch.memory_format:
    """The format that the strides of a tensor (B, C, H, W) are those of; channels_last_3d of five dimensions.

    With a single channel or a single pixel a tensor is contiguous in both, and the strides of dimensions of one entry
    tell, which is what torch's kernels go by. With a single value a row nobody can tell: the ordinary one.
    """
    last = LAST.get(tensor.dim())
    if last is None or not tensor.is_contiguous(memory_format=last) or tensor.shape[1:].numel() == 1:
        return torch.contiguous_format
    channels_are_last = tensor.stride(1) == 1 and tensor.stride(-1) == tensor.shape[1]
    return last if channels_are_last else torch.contiguous_format


def format_of_model(model: nn.Module) -> torch.memory_format:
    """channels_last if all two-dimensional kernels of the model are, as `model.to(memory_format=...)` leaves them."""
    kernels = [p for p in model.parameters() if p.dim() == 4 and p.shape[1:].numel() > 1]
    last = bool(kernels) and all(format_of(kernel) is torch.channels_last for kernel in kernels)
    return torch.channels_last if last else torch.contiguous_format
