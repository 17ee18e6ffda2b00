"""How the tensors behind a computed weight follow a change of its rows and columns.

The layer has to use afterwards what it would use if the weight were plain: the rows and columns that were selected, of
the weight as it was. Weight norm can give any weight. Spectral norm divides what is left by its largest singular value,
which stays if only zeros have gone; copies would change it. Any other parametrisation is tried out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList

from morphtrain.errors import first_line
from morphtrain.morph.computation import (
    FAILURES,
    computation,
    computed_by,
    has_dim,
    inverse,
    is_close,
    is_known,
    is_spectral_norm,
    is_weight_norm,
    norm_dim,
    original_names,
    originals,
    tensors_behind,
)
from morphtrain.morph.effective import POWER_ITERATIONS, effective
from morphtrain.morph.errors import MorphError
from morphtrain.morph.modes import kept_modes
from morphtrain.morph.surgery.change import Change, select


class Replacement(NamedTuple):
    """What becomes of one tensor of a module.

    Args:
        changes: of its rows; optimizer state follows them. None: it has nothing in common with the tensor before.
        value: the new tensor; None: the old one after the changes.
        factor: what it is multiplied by besides, in `value` already; averages of its gradients are, too.
        averaged: what becomes of its moving average; None: the same as of the tensor.
    """

    module: nn.Module
    name: str
    changes: Sequence[Change] | None
    value: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    averaged: torch.Tensor | None = None


@torch.no_grad()
def replacements(path: str, module: nn.Module, name: str, changes: Sequence[Change]) -> list[Replacement]:
    """What has to be replaced for `module.<name>` to change: itself, or what it is computed from. Nothing is yet.

    Args:
        path: of the module, for messages.

    Raises:
        MorphError: if a computed tensor cannot change in this way.
    """
    computed = computation(module, name)
    if computed is None:
        return [Replacement(module, name, changes)]
    try:
        if is_weight_norm(computed):
            return _of_weight_norm(computed, effective(module, name), changes)
        if is_spectral_norm(computed):
            return _of_spectral_norm(computed, changes)
        return _of_others(computed, effective(module, name), changes)
    except MorphError as error:
        raise MorphError(f"'{path}': its {name} is computed by {computed_by(computed)}, {error}") from error


def _of_weight_norm(
    computed: ParametrizationList, weight: torch.Tensor, changes: Sequence[Change]
) -> list[Replacement]:
    """g * v / ||v||: g / ||v|| of what is left stays. Where all of v that is left is zero, g is, and v becomes ones."""
    (g, v), dim = originals(computed), norm_dim(computed)
    new_v = select(v, changes)
    rows = [change._replace(scale=None) for change in changes if dim != -1 and change.dim == dim % v.dim()]
    before, after = select(torch.norm_except_dim(v, 2, dim), rows), torch.norm_except_dim(new_v, 2, dim)
    factor = torch.where(before > 0, after / before, 0.0)
    new_g = select(g, rows) * factor
    if bool((after == 0).any()):
        new_v.masked_fill_(after == 0, 1.0)  # the network would compute with 0 / 0
    values = {"original0": new_g, "original1": new_v}
    if not (is_known(computed) or _gives(computed, values, select(weight, changes))):
        raise MorphError("but by another rule than that of weight norm; its channels cannot change")
    return [
        Replacement(computed, "original0", rows, new_g, factor),
        Replacement(computed, "original1", changes, new_v),
    ]


def _of_spectral_norm(computed: ParametrizationList, changes: Sequence[Change]) -> list[Replacement]:
    """W / sigma(W), with singular vectors u and v of W as a matrix: they follow its rows and columns.

    If more than zeros has gone, sigma is another, and the vectors are found again as for a new layer.
    """
    if any(len(change.rows.unique()) < len(change.rows) for change in changes):
        raise MorphError("so copies of its channels would change what it computes; it can be pruned, but not widened")
    norm: Any = computed[0]
    weight = computed.original
    others = [d for d in range(weight.dim()) if d != norm.dim]
    new = select(weight, changes)
    v = norm._v.view([weight.shape[d] for d in others])
    u = select(norm._u, [Change(0, change.rows) for change in changes if change.dim == norm.dim])
    v = select(v, [Change(others.index(change.dim), change.rows) for change in changes if change.dim != norm.dim])
    u, v = u.clone(), v.flatten().clone()
    if int(new.count_nonzero()) < int(weight.count_nonzero()):
        u, v = _singular_vectors(norm, new, u, v)
    return [
        Replacement(computed, "original", changes, new),
        Replacement(norm, "_u", None, u),
        Replacement(norm, "_v", None, v),
    ]


def _singular_vectors(
    norm: nn.Module, weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors of the largest singular value of `weight`, by power iterations that start from `v`."""
    twin: Any = copy.deepcopy(norm)
    matrix = twin._reshape_weight_to_matrix(weight)
    if not bool(matrix.any()):
        raise MorphError("which would divide by zero: nothing but zeros would be left of it")
    twin._u, twin._v = u, F.normalize(v if bool((matrix @ v).any()) else torch.ones_like(v), dim=0)
    twin._power_method(matrix, POWER_ITERATIONS)
    return twin._u, twin._v


def _of_others(computed: ParametrizationList, weight: torch.Tensor, changes: Sequence[Change]) -> list[Replacement]:
    """Whatever gives the selected weight: the same selection of the tensors behind it, or an inverse."""
    wanted = select(weight, changes)
    wrong = ""
    for values_of in (_selected, _inverted):
        try:
            values = values_of(computed, weight, changes, wanted)
            if _gives(computed, values, wanted):
                return [_replacement(computed, name, value, weight, changes) for name, value in values.items()]
            wrong = wrong or "which gives another weight from a selection of what it starts from"
        except FAILURES as error:
            wrong = wrong or f"which fails on a selection of what it starts from ({first_line(error)})"
    raise MorphError(f"{wrong}; its channels cannot change like this")


def _gives(computed: ParametrizationList, values: Mapping[str, torch.Tensor], wanted: torch.Tensor) -> bool:
    """Whether a weight is computed as `wanted` from other values, by name."""
    with kept_modes(computed):
        return is_close(functional_call(computed.eval(), dict(values), ()), wanted)


def _selected(
    computed: ParametrizationList, weight: torch.Tensor, changes: Sequence[Change], wanted: torch.Tensor
) -> dict[str, torch.Tensor]:
    """By name, the tensors behind a weight that have its rows or columns, with those that it will have."""
    own = {name: _own(computed, name, weight, changes) for name in tensors_behind(computed)}
    return {name: select(tensors_behind(computed)[name], found) for name, found in own.items() if found}


def _inverted(
    computed: ParametrizationList, weight: torch.Tensor, changes: Sequence[Change], wanted: torch.Tensor
) -> dict[str, torch.Tensor]:
    """By name, the originals of the wanted weight."""
    values = zip(original_names(computed), inverse(computed, wanted), strict=True)
    return {name: value.detach().clone() for name, value in values}


def _own(computed: ParametrizationList, name: str, weight: torch.Tensor, changes: Sequence[Change]) -> list[Change]:
    """The changes that a tensor behind a weight takes part in; originals of the weight's shape are scaled, too."""
    tensor = tensors_behind(computed)[name]
    scaled = name in original_names(computed) and tensor.shape == weight.shape
    own = [change for change in changes if has_dim(tensor, weight, change.dim)]
    return own if scaled else [change._replace(scale=None) for change in own]


def _replacement(
    computed: ParametrizationList, name: str, value: torch.Tensor, weight: torch.Tensor, changes: Sequence[Change]
) -> Replacement:
    path, _, own_name = name.rpartition(".")
    own = _own(computed, name, weight, changes)
    follows = select(tensors_behind(computed)[name], own).shape == value.shape
    return Replacement(computed.get_submodule(path), own_name, own if follows else None, value)
