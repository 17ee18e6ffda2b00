"""The layers of a network whose weight is computed: whose channels can change, and whose can only become fewer."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from morphtrain.morph.computation import (
    computation,
    computed_by,
    computed_names,
    is_known,
    is_weight_norm,
    tensors_behind,
)
from morphtrain.morph.effective import effective
from morphtrain.morph.errors import MorphError
from morphtrain.morph.modes import copy_of
from morphtrain.morph.surgery.change import Change
from morphtrain.morph.surgery.computed import replacements
from morphtrain.morph.trace.kinds import MIXING, TENSORS, TRANSPOSED, is_torch_layer

HOOKS = "its weight is computed by hooks; the norms of torch.nn.utils.parametrizations are followed"


class ComputedWeights(NamedTuple):
    """What is known of the computed weights of a network.

    Args:
        kept: by the path of a layer whose channels cannot change, why.
        narrowing: (id of a layer, dimension of its weight) where channels can go, but none can be repeated.
    """

    kept: dict[str, str]
    narrowing: set[tuple[int, int]]


def computed_weights(model: nn.Module) -> ComputedWeights:
    """Look at all computed weights of `model` and try out how they follow changes; nothing is changed."""
    found = ComputedWeights({}, set())
    uses = _uses(model)
    for path, module in model.named_modules():
        if any(isinstance(vars(module).get(name), torch.Tensor) for name in TENSORS) and path:
            found.kept[path] = HOOKS
        elif computed_names(module) and path:
            why = _why_kept(path, module, uses)
            if why:
                found.kept[path] = why
            else:
                found.narrowing.update((id(module), dim) for dim in (0, 1) if not _widens(path, module, dim))
    return found


def _why_kept(path: str, module: nn.Module, uses: Counter[int]) -> str:
    """Why a layer with computed tensors keeps its channels; "" if they can change."""
    names = computed_names(module)
    by = ", ".join(computed_by(found) for name in names if (found := computation(module, name)) is not None)
    said = f"its {' and '.join(names)} {'is' if len(names) == 1 else 'are'} computed by {by}"
    if names != ["weight"] or not isinstance(module, MIXING) or not is_torch_layer(module):
        return said
    computed = computation(module, "weight")
    assert computed is not None
    if any(uses[id(part)] > 1 for part in (computed, *computed, *computed.parameters(), *computed.buffers())):
        return f"{said} from what others use, too"
    if is_known(computed) or (is_weight_norm(computed) and _is_meta(computed)):
        return ""
    sizes, twin = effective(module).shape[:2], _drawn(module)
    try:
        for dim in (dim for dim in (0, 1) if sizes[dim] > 1):
            replacements(path, twin, "weight", [Change(dim, torch.arange(sizes[dim] - 1, 0, -1))])
    except MorphError:
        return f"{said}, which gives another weight for fewer channels"
    return ""


def _widens(path: str, module: nn.Module, dim: int) -> bool:
    """Whether a weight can have an entry along `dim` twice, halved if it is of an input."""
    computed, size = computation(module, "weight"), effective(module).shape[dim]
    assert computed is not None
    if is_known(computed) or _is_meta(computed):
        return is_weight_norm(computed)
    scale = torch.ones(size + 1, dtype=torch.double)
    scale[[0, -1]] = 0.5
    consumes = dim == (0 if isinstance(module, TRANSPOSED) else 1)
    change = Change(dim, torch.arange(size + 1) % size, scale if consumes else None)
    try:
        return bool(replacements(path, _drawn(module), "weight", [change]))
    except MorphError:
        return False


def _drawn(module: nn.Module) -> nn.Module:
    """A copy of a layer with random values behind its weight; its own may not be set yet, in a run that is resumed."""
    twin = copy_of(module)
    computed, random = computation(twin, "weight"), torch.Generator().manual_seed(0)
    assert computed is not None
    for tensor in tensors_behind(computed).values():
        if tensor.is_floating_point() and not tensor.is_meta:
            tensor.data.copy_(0.1 + 0.9 * torch.rand(tensor.shape, generator=random))
    return twin


def _uses(model: nn.Module) -> Counter[int]:
    """By id, how many modules hold a tensor, how many layers use a computation, and how many computations a step."""
    modules = list(model.modules())
    used = [computation(module, name) for module in modules for name in computed_names(module)]
    tensors = [t for module in modules for t in (*module._parameters.values(), *module._buffers.values())]
    steps = [step for computed in dict.fromkeys(used) for step in computed or () if _has_tensors(step)]
    return Counter(id(one) for one in (*used, *steps, *tensors) if one is not None)


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _is_meta(module: nn.Module) -> bool:
    """Whether a computation has no values that could be tried out."""
    return any(parameter.is_meta for parameter in module.parameters())
