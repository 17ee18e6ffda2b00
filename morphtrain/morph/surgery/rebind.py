"""The one place where a tensor of a module is replaced, together with the optimizer's references to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain.morph.computation import computation
from morphtrain.morph.surgery.additions import additions_of
from morphtrain.morph.surgery.averages import Averages, averages_of
from morphtrain.morph.surgery.change import Change, select
from morphtrain.morph.surgery.computed import Replacement, replacements
from morphtrain.morph.trace.traced import Shared

# Optimizer state that is an average of gradients: it follows its parameter's index and scale. Other state of the
# parameter's shape (Adam's second moments) follows the index only.
FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg"})


class Rebinder:
    """Replaces tensors of modules, and with them the parameters and the state of an optimizer.

    Args:
        shared: which other modules hold the same tensors.
        optimizer: the one to update, if any.
    """

    def __init__(self, shared: Shared, optimizer: Optimizer | None) -> None:
        self.shared = shared
        self.optimizer = optimizer
        self.averages = Averages() if optimizer is None else averages_of(optimizer)
        self.positions = {
            id(p): (group, i)
            for group in (optimizer.param_groups if optimizer else ())
            for i, p in enumerate(group["params"])
        }

    def planned(self, path: str, module: nn.Module, name: str, changes: Sequence[Change]) -> list[Replacement]:
        """See `computed.replacements`; where a tensor is computed, with the averages that compute what they did."""
        found = replacements(path, module, name, changes)
        if not self.averages.values or computation(module, name) is None:
            return found
        with self.averages.in_place(module.parameters()):
            averaged = {(r.module, r.name): r.value for r in replacements(path, module, name, changes)}
        return [r._replace(averaged=averaged.get((r.module, r.name))) for r in found]

    def reindex(self, replacement: Replacement) -> None:
        """Put a new tensor in the place of one of a module's.

        A new parameter is made and bound to the name, because swapping `.data` under a live gradient accumulator fails
        at the next backward. `requires_grad`, dtype, device, memory format and parameter-group membership are kept, and
        optimizer state of the parameter's shape follows, and so does its average. The gradient is dropped, so call this
        between steps.
        """
        module, name, changes, new, factor, averaged = replacement
        old = getattr(module, name)
        if new is None:
            new = select(old, changes or ())
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            self._update_optimizer(old, new, changes, factor)
            self.averages.follow(old, new, changes, averaged)
        for owner, other in ((module, name), *self.shared.get((id(module), name), ())):
            setattr(owner, other, new)

    def adopt(self, model: nn.Module, parameters: Iterable[nn.Parameter], like: nn.Module) -> None:
        """Add new parameters of `model` to the optimizer, each to the group of a similar parameter.

        Weights go to a group of weights and vectors to a group of vectors, since the two often have different weight
        decay. The parameters of `like` are looked at first, then those of the whole model. A group stays in the order
        of the model, as if the optimizer had been made with the model as it is now.
        """
        if self.optimizer is None:
            return
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        order = {id(p): i for i, p in enumerate(model.parameters())}
        for new in parameters:
            self.averages.adopt(new)
            known = [p for p in (*like.parameters(), *model.parameters()) if id(p) in groups]
            alike = [p for p in known if (p.dim() > 1) == (new.dim() > 1)] or known
            if not alike:
                continue  # the optimizer has no parameter of this model
            group = groups[id(alike[0])]["params"]
            later = (i for i, p in enumerate(group) if order.get(id(p), -1) > order[id(new)])
            group.insert(next(later, len(group)), new)
            additions_of(self.optimizer).adopt(new)

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take parameters out of the optimizer's groups and state."""
        assert self.optimizer is not None
        gone = list(parameters)
        ids = {id(parameter) for parameter in gone}
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
        for parameter in gone:
            self.optimizer.state.pop(parameter, None)
        additions_of(self.optimizer).forget(gone)
        self.averages.forget(gone)

    def _update_optimizer(
        self, old: nn.Parameter, new: nn.Parameter, changes: Sequence[Change] | None, factor: torch.Tensor | None
    ) -> None:
        if self.optimizer is None or id(old) not in self.positions:
            return
        group, position = self.positions.pop(id(old))
        group["params"][position] = new
        self.positions[id(new)] = group, position
        state = self.optimizer.state.pop(old, None)
        if changes is None:
            additions_of(self.optimizer).forget([old])
            return
        additions_of(self.optimizer).follow(old, new, changes)
        if state is not None:
            unscaled = [change._replace(scale=None) for change in changes]
            self.optimizer.state[new] = {
                key: _scaled(select(value, changes), factor)
                if key in FIRST_MOMENTS
                else select(value, unscaled)
                if isinstance(value, torch.Tensor) and value.shape == old.shape
                else value
                for key, value in state.items()
            }


def _scaled(average: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    return average if factor is None else average * factor.to(average.dtype)
