"""What the processes of a run have computed on their shares of a batch, summed: one message for all of a type."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain import world


def sum_gradients(
    model: nn.Module, optimizer: Optimizer, loss: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the gradients of a model over all processes, in place; returns the sums of two further numbers.

    So are those of parameters which the optimizer has besides, such as a method's own.

    A parameter without a gradient in some processes has that of the others; one that has none in any is left without.
    A process that has all gradients reads nothing off the device.

    Args:
        loss, right: scalars, of floating point and whole.
    """
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    parameters = [parameter for parameter in dict.fromkeys([*model.parameters(), *trained]) if parameter.requires_grad]
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    present = torch.ones(len(parameters), dtype=dtype, device=loss.device)
    missing = [number for number, parameter in enumerate(parameters) if parameter.grad is None]
    for number in missing:
        present[number] = 0
        parameters[number].grad = torch.zeros_like(parameters[number])
    numbers = torch.stack([loss.to(dtype), right.to(dtype)])  # counts are exact in it up to 2^24
    world.sum_([numbers, present, *(parameter.grad for parameter in parameters if parameter.grad is not None)])
    if missing:
        processes = present.tolist()
        for number in missing:
            if processes[number] == 0:
                parameters[number].grad = None
    return numbers[0], numbers[1].long()
