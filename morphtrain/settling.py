"""Batch norm's running statistics, measured again for the weights as they are, and the same in all processes.

Running statistics are a moving average over the last steps, so they lag behind weights that move fast: under a penalty
that shrinks them, at a constant learning rate, after a change of structure. What is evaluated with them is not what was
trained. Settled statistics are the mean over a few batches at fixed weights: "PreciseBN" in Wu and Johnson 2021 (arXiv
2105.07576).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from morphtrain import world
from morphtrain.morph import kept_modes


def trained_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a model in training mode that update running statistics; frozen ones do not."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.training and norm.running_mean is not None]


def synchronises(model: nn.Module) -> bool:
    """Whether the norms of a model in training wait for one another, of all processes: all have to call them."""
    return any(isinstance(m, nn.SyncBatchNorm) or getattr(m, "synchronises", False) is True for m in model.modules())


@torch.no_grad()
def settle(
    model: nn.Module,
    norms: Sequence[_BatchNorm],
    batches: Iterable[torch.Tensor],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Set the running statistics of `norms` to their mean over `batches`; everything else of `model` stays.

    Only these norms are in training mode meanwhile: dropout and stochastic depth are off, as in the evaluation that the
    statistics are for (Li et al. 2019, arXiv 1801.05134), and nothing draws random numbers. That is also why this is
    not `torch.optim.swa_utils.update_bn`, which trains the whole model and resets frozen norms, too. A norm that
    evaluation does not reach, as those of auxiliary heads, keeps its statistics.

    Args:
        norms: those to settle, usually the `trained_norms` of the model.
        batches: images (B, C, H, W) as training sees them, of the same size each.
        context: of each forward pass, such as `Precision.autocast`.
    """
    before = [(norm, norm.momentum, [buffer.clone() for buffer in norm.buffers(recurse=False)]) for norm in norms]
    try:
        with kept_modes(model):
            model.eval()
            for norm in norms:
                norm.training, norm.momentum = True, None  # the mean of all batches since the reset
                norm.reset_running_stats()
            for images in batches:
                with context():
                    model(images)
    finally:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            if norm.num_batches_tracked == 0:
                for buffer, value in zip(norm.buffers(recurse=False), buffers, strict=True):
                    buffer.copy_(value)


@torch.no_grad()
def agree_buffers(model: nn.Module, images: int) -> None:
    """Give a model the same buffers in all processes, whatever each has in them.

    What differs are the running statistics of norms: each process has normalised its own part of every batch by its own
    mean and variance, as ghost norm does with its chunks. What evaluation needs is what a norm did on average over the
    images, so they become their mean, in which each process counts as much as it has images of a batch. The mean of the
    means is that of the whole batch; that of the variances is the one within the parts, as with ghost norm in one
    process. Other floating-point buffers, which a network of the user's own may keep of what it sees, become their mean
    likewise. What is equal stays so to the bit: norms with `norm=sync`, frozen ones, constants. Of counters, indices
    and masks the main process's hold.

    Args:
        images: of a whole batch, this process's. What a process without any has in its buffers counts for nothing.
    """
    if world.size() == 1 or next(model.buffers(), None) is None:
        return
    floats = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    others = [buffer for buffer in model.buffers() if not buffer.is_floating_point()]
    own = torch.cat([torch.zeros(0), *(buffer.cpu().flatten() for buffer in floats)]).double()
    main, main_others = world.agree((own, [buffer.cpu() for buffer in others]))
    differs = (own != main) & (images > 0)  # a process without images may have anything, such as no number
    sums = torch.where(differs, own - main, 0.0) * images, torch.tensor(float(images), dtype=torch.double)
    world.sum_(sums)
    agreed = main + sums[0] / sums[1]
    for buffer, values in zip(floats, agreed.split([buffer.numel() for buffer in floats]), strict=True):
        buffer.copy_(values.view(buffer.shape))
    for buffer, value in zip(others, main_others, strict=True):
        buffer.copy_(value)
