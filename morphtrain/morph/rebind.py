"""The one place where a tensor of a module is replaced, and the optimizer told."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

# Optimizer state that is an average of gradients follows its parameter, scale included. Everything else of the
# parameter's shape (Adam's second moments) follows the index only.
FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg"})


def reindex_tensor(
    module: nn.Module,
    name: str,
    dim: int,
    rows: torch.Tensor,
    scale: torch.Tensor | None = None,
    optimizer: Optimizer | None = None,
) -> None:
    """Make row j of `module.<name>` along `dim` what row `rows[j]` was, times `scale[j]`.

    A new parameter is made and rebound: swapping `.data` under a live gradient accumulator fails at the next
    backward. `requires_grad`, dtype, device, memory format and parameter-group membership are kept; optimizer state
    of the parameter's shape follows. The gradient is dropped, so call it between steps.
    """
    old = getattr(module, name)
    new = _select(old, dim, rows, scale)
    if not isinstance(old, nn.Parameter):
        setattr(module, name, new)
        return
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, name, parameter)
    if optimizer is None or not _replace_in_groups(optimizer, old, parameter):
        return
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[parameter] = {
            key: _select(value, dim, rows, scale if key in FIRST_MOMENTS else None)
            if isinstance(value, torch.Tensor) and value.shape == old.shape
            else value
            for key, value in state.items()
        }


def forget_parameters(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> None:
    """Take parameters out of the optimizer: its groups and its state."""
    gone = list(parameters)
    ids = {id(parameter) for parameter in gone}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    for parameter in gone:
        optimizer.state.pop(parameter, None)


def _select(tensor: torch.Tensor, dim: int, rows: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        new = tensor.index_select(dim, rows.to(tensor.device))
        if scale is not None:
            shape = [1] * new.dim()
            shape[dim] = -1
            new = new * scale.to(device=new.device, dtype=new.dtype).view(shape)
    return new.contiguous(memory_format=_memory_format(tensor))


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def _replace_in_groups(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> bool:
    for group in optimizer.param_groups:
        for position, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][position] = new
                return True
    return False
