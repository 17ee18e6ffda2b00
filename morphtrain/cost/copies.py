"""A copy of a model and its optimizer, over other tensors."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from morphtrain.morph import stored_activations

# An optimizer of the model's parameters, or what makes one of parameters: a class of torch.optim, or a partial of one.
Optimizing = Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer]

MOMENTUM_SGD = partial(SGD, lr=0.1, momentum=0.9)


def copied(
    model: nn.Module, optimizer: Optimizing, convert: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[nn.Module, Optimizer]:
    """A copy of the model in training mode, and an optimizer of its parameters that has not taken a step yet.

    Args:
        optimizer: of `model`, whose settings and parameter groups are copied; or what makes one of parameters.
        convert: makes the new tensor of every parameter and buffer; no other copy of them is made on the way. Shared
            parameters stay shared.
    """
    with torch.no_grad():
        new: dict[int, object] = {id(buffer): convert(buffer) for buffer in model.buffers()}
        new |= stored_activations(model)
        for parameter in model.parameters():
            new[id(parameter)] = nn.Parameter(convert(parameter), parameter.requires_grad)
    twin = copy.deepcopy(model, new).train()
    if not isinstance(optimizer, Optimizer):
        return twin, optimizer(parameter for parameter in twin.parameters() if parameter.requires_grad)
    fresh = copy.copy(optimizer)
    fresh.state = defaultdict(dict)
    return twin, copy.deepcopy(fresh, new)
