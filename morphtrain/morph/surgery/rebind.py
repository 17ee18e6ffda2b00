"""The one place where a tensor of a module is replaced, and the optimizer told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain.morph.formats import format_of

# Optimizer state that is an average of gradients follows its parameter, scale included. Everything else of the
# parameter's shape (Adam's second moments) follows the index only.
FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg"})

Shared = Mapping[tuple[int, str], Sequence[tuple[nn.Module, str]]]  # (id of module, tensor name) -> its other names


class Change(NamedTuple):
    """Make row j along `dim` what row `rows[j]` was, times `scale[j]`."""

    dim: int
    rows: torch.Tensor
    scale: torch.Tensor | None = None


class Rebinder:
    """Replaces tensors of modules, and the parameters of an optimizer with them.

    Args:
        shared: what other modules hold the same tensors.
        optimizer: its parameter groups and its state follow.
    """

    def __init__(self, shared: Shared, optimizer: Optimizer | None) -> None:
        self.shared = shared
        self.optimizer = optimizer
        self.positions = {
            id(p): (group, i)
            for group in (optimizer.param_groups if optimizer else ())
            for i, p in enumerate(group["params"])
        }

    def reindex(self, module: nn.Module, name: str, changes: Sequence[Change]) -> None:
        """Change `module.<name>` along some of its dimensions.

        A new parameter is made and rebound: swapping `.data` under a live gradient accumulator fails at the next
        backward. `requires_grad`, dtype, device, memory format and parameter-group membership are kept; optimizer
        state of the parameter's shape follows. The gradient is dropped, so call it between steps.
        """
        old = getattr(module, name)
        new = _select(old, changes)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            self._tell_optimizer(old, new, changes)
        for owner, other in ((module, name), *self.shared.get((id(module), name), ())):
            setattr(owner, other, new)

    def adopt(self, model: nn.Module, parameters: Iterable[nn.Parameter], like: nn.Module) -> None:
        """Give the optimizer new parameters of `model`, each to the group that a neighbour of its kind is in.

        Kinds are weights and vectors, which often decay differently; the neighbours are those of `like`, and if that
        has none of the kind in the optimizer, all. Within a group they stand in the model's order, where they would if
        the optimizer were made of the model as it is now.
        """
        if self.optimizer is None:
            return
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        order = {id(p): i for i, p in enumerate(model.parameters())}
        for new in parameters:
            known = [p for p in (*like.parameters(), *model.parameters()) if id(p) in groups]
            alike = [p for p in known if (p.dim() > 1) == (new.dim() > 1)] or known
            if not alike:
                continue  # an optimizer of something else
            group = groups[id(alike[0])]["params"]
            later = (i for i, p in enumerate(group) if order.get(id(p), -1) > order[id(new)])
            group.insert(next(later, len(group)), new)

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take parameters out of the optimizer: its groups and its state."""
        assert self.optimizer is not None
        gone = list(parameters)
        ids = {id(parameter) for parameter in gone}
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
        for parameter in gone:
            self.optimizer.state.pop(parameter, None)

    def _tell_optimizer(self, old: nn.Parameter, new: nn.Parameter, changes: Sequence[Change]) -> None:
        if self.optimizer is None or id(old) not in self.positions:
            return
        group, position = self.positions.pop(id(old))
        group["params"][position] = new
        self.positions[id(new)] = group, position
        state = self.optimizer.state.pop(old, None)
        if state is not None:
            unscaled = [change._replace(scale=None) for change in changes]
            self.optimizer.state[new] = {
                key: _select(value, changes if key in FIRST_MOMENTS else unscaled)
                if isinstance(value, torch.Tensor) and value.shape == old.shape
                else value
                for key, value in state.items()
            }


def _select(tensor: torch.Tensor, changes: Sequence[Change]) -> torch.Tensor:
    new = tensor.detach()
    for dim, rows, scale in changes:
        new = new.index_select(dim, rows.to(tensor.device))
        if scale is not None:
            shape = [1] * new.dim()
            shape[dim] = -1
            new = new * scale.to(device=new.device, dtype=new.dtype).view(shape)
    memory_format = format_of(tensor)
    if memory_format is torch.contiguous_format:
        return new.contiguous()
    # Not contiguous(...): of a single channel that returns what it is given, and the format would be forgotten.
    return torch.empty(new.shape, dtype=new.dtype, device=new.device, memory_format=memory_format).copy_(new)
