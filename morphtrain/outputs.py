"""Does a network fit the data and the loss? Checked when a run is built, not an epoch later."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from morphtrain.errors import UserError, said
from morphtrain.memory_limit import is_out_of_memory
from morphtrain.morph import input_type, kept_modes

SAMPLES = 2  # batch norm cannot train on one value per channel


def check_outputs(
    name: str,
    model: nn.Module,
    input_shape: Sequence[int],
    num_classes: int,
    samples: int = SAMPLES,
    images: torch.dtype | None = None,
) -> None:
    """Raise a `UserError` naming model `name` unless it turns (B, *input_shape) into logits (B, num_classes).

    Tried on `samples` blank images, in training and in evaluation mode, since some networks return different things in
    the two. That costs less than a training step; meta tensors would cost nothing, but networks that create tensors in
    `forward` fail on them. Parameters, buffers, modes and random numbers are unchanged.

    Args:
        images: their type; None: that of the model's layers.
    """
    tensors = list(chain(model.parameters(), model.buffers()))
    if any(is_lazy(tensor) for tensor in tensors):
        raise UserError(f"{name}: has lazy layers, whose size is not known before their first use; give them a size")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{name}: has no parameter to train")
    x = torch.zeros(samples, *input_shape, dtype=images or input_type(model), device=tensors[0].device)
    with kept_modes(model):
        for training in (True, False):
            _check(name, model.train(training), x, num_classes)


@torch.no_grad()
def _check(name: str, model: nn.Module, x: torch.Tensor, num_classes: int) -> None:
    mode = "training" if model.training else "evaluation"
    buffers = {path: buffer.clone() for path, buffer in model.named_buffers()}  # running statistics move
    try:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):  # dropout draws
            output = torch.func.functional_call(model, buffers, (x,))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        refused = f"cannot take images of {tuple(x.shape[1:])} in {mode} mode"
        raise UserError(f"{name}: {refused}: {said(error)}") from error
    wanted = (len(x), num_classes)
    if not isinstance(output, torch.Tensor):
        found = f"a {type(output).__name__}"
    elif output.shape != wanted:
        found = f"a tensor of {tuple(output.shape)}"
    else:
        return
    raise UserError(f"{name}: returns {found} in {mode} mode; the loss needs one tensor of logits (B, {num_classes})")
