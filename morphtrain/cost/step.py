"""The training step whose memory and speed are measured: the same as in the trainer's loop."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from morphtrain.morph.formats import format_of


def backpropagate(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, autocast_dtype: torch.dtype | None
) -> None:
    """Leave the gradients of the cross-entropy of `images` (B, ...) and `labels` (B,) in the parameters."""
    cast = nullcontext() if autocast_dtype is None else torch.autocast(images.device.type, dtype=autocast_dtype)
    with cast:
        loss = F.cross_entropy(model(images), labels)
    loss.backward()


def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Forward, backward and optimizer step on `images` (B, ...) and `labels` (B,); gradients are None afterwards."""
    backpropagate(model, images, labels, autocast_dtype)
    optimizer.step()
    optimizer.zero_grad()


def blank_batch(model: nn.Module, input_shape: tuple[int, ...], batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, *input_shape) of zeros where the model is, of its type and format; labels (B,) of the first class."""
    parameter = next(model.parameters())
    images = torch.zeros(batch_size, *input_shape, dtype=parameter.dtype, device=parameter.device)
    if images.dim() == 4 and any(format_of(p) is torch.channels_last for p in model.parameters()):
        images = images.to(memory_format=torch.channels_last)
    return images, torch.zeros(batch_size, dtype=torch.long, device=parameter.device)
