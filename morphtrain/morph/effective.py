"""Weights as the layers use them, whether they are parameters or computed from some (weight norm, spectral norm).

`torch.nn.utils.parametrize` gives a module a `weight` that is computed each time it is read. It is no parameter: it has
no `.grad`, what is written into it is lost, and reading it may change a state (spectral norm, in training mode, takes a
step of its power iteration). What asks for weights or changes them goes through here; for a plain parameter or buffer,
each function does the obvious thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from morphtrain.errors import first_line
from morphtrain.morph.computation import (
    FAILURES,
    computation,
    computed_by,
    computed_names,
    inverse,
    is_close,
    is_spectral_norm,
    is_weight_norm,
    norm_dim,
    originals,
    plain_type,
    right_inverse,
)
from morphtrain.morph.errors import MorphError
from morphtrain.morph.modes import copy_of, kept_modes
from morphtrain.morph.number_types import exact

POWER_ITERATIONS = 15  # those with which torch's spectral norm starts


def effective(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """The tensor `module.<name>` as the layer uses it in evaluation mode; reading it changes nothing.

    A plain parameter or buffer is returned itself. A computed one is a new tensor, through which gradients flow to the
    parameters behind it: change these with `assign` or `scale`.
    """
    computed = computation(module, name)
    if computed is None:
        tensor: torch.Tensor = getattr(module, name)
        return tensor
    with kept_modes(computed):
        value: torch.Tensor = computed.eval()()
        return value


@torch.no_grad()
def assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Change the values behind `module.<name>` in place so that the layer uses `tensor`, of the same shape.

    Under weight norm the norms of v stay, and so do the signs of g; where `tensor` is zero, g is, and v stays.

    Raises:
        MorphError: with all values as they were, if the computation cannot give `tensor` (spectral norm gives only
            weights whose largest singular value is 1).
    """
    computed = computation(module, name)
    if computed is None:
        getattr(module, name).copy_(tensor)
    else:
        _set(module, name, tensor, lambda: inverse(computed, tensor))


@torch.no_grad()
def scale(module: nn.Module, name: str, factor: torch.Tensor) -> None:
    """Multiply `module.<name>`, as the layer uses it, by `factor`, which broadcasts over it, in place.

    What is multiplied by zero is exactly zero. Spectral norm has its original multiplied, and divides by the largest
    singular value of that: the layer uses the scaled weight up to one number.

    Raises:
        MorphError: with all values as they were, if the computation cannot give the scaled weight.
    """
    computed = computation(module, name)
    if computed is None:
        getattr(module, name).mul_(factor)
    elif is_spectral_norm(computed):
        computed.original.mul_(factor)
    else:
        wanted = effective(module, name) * factor
        try:
            assign(module, name, wanted)
        except MorphError:  # it has no inverse, but may scale with what it starts from
            whole = wanted.shape
            _set(module, name, wanted, lambda: [t * factor if t.shape == whole else t for t in originals(computed)])


def trained(module: nn.Module, name: str = "weight") -> bool:
    """Whether gradients reach `module.<name>`."""
    return any(parameter.requires_grad for parameter in parameters_of(module, name))


def parameters_of(module: nn.Module, name: str = "weight") -> list[nn.Parameter]:
    """The parameters that `module.<name>` is computed from: itself, if it is plain; none, if it is a buffer."""
    computed = computation(module, name)
    if computed is not None:
        return list(computed.parameters())
    tensor = getattr(module, name)
    return [tensor] if isinstance(tensor, nn.Parameter) else []


@torch.no_grad()
def sensitivity(module: nn.Module, name: str = "weight") -> torch.Tensor | None:
    """Gradient of the loss times value, entry by entry: its derivative by a factor on each entry of `module.<name>`.

    It comes from the `.grad` of the parameters behind it; None if they have none. Under spectral norm the factors are
    on its original.

    Raises:
        MorphError: for a computed weight of which that is not known.
    """
    computed, parameters = computation(module, name), parameters_of(module, name)
    if all(parameter.grad is None for parameter in parameters):
        return None
    if computed is not None and is_weight_norm(computed):
        (g, v), dim = originals(computed), norm_dim(computed)
        by_length, by_direction = (exact(torch.zeros_like(t) if t.grad is None else t.grad) * exact(t) for t in (g, v))
        return by_direction + by_length * exact(v / torch.norm_except_dim(v, 2, dim)).square()
    if computed is None or is_spectral_norm(computed):
        (parameter,) = parameters
        return None if parameter.grad is None else exact(parameter.grad) * exact(parameter)
    raise MorphError(f"the derivative by the {name} of a {type(module).__name__} is not known: it is computed")


def identity(module: nn.Module, name: str = "weight") -> int:
    """One number for what is one tensor in several modules (tied weights), computed or not."""
    computed = computation(module, name)
    return id(getattr(module, name, None) if computed is None else computed)


def tensors_in_use(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter of a model, each once; in the place of those that a tensor is computed from, that tensor."""
    computed = {identity(module, name): (module, name) for module in model.modules() for name in computed_names(module)}
    behind = {id(parameter) for module, name in computed.values() for parameter in parameters_of(module, name)}
    yield from (parameter for parameter in model.parameters() if id(parameter) not in behind)
    yield from (effective(module, name) for module, name in computed.values())


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Put plain tensors, of their present values, in the place of all that `torch.nn.utils.parametrize` computes.

    Tied weights stay tied. (`torch.nn.utils.parametrize.remove_parametrizations` would take the weight from every deep
    copy of the layer, too.)
    """
    plain: dict[int, torch.Tensor] = {}
    for module in list(model.modules()):
        if not computed_names(module):
            continue
        for name in computed_names(module):
            key = identity(module, name)
            if key not in plain:
                value = effective(module, name).detach().clone()
                plain[key] = nn.Parameter(value, trained(module, name)) if parameters_of(module, name) else value
            held = module._parameters if isinstance(plain[key], nn.Parameter) else module._buffers
            held[name] = plain[key]  # type: ignore[assignment]
        plain_class = plain_type(module)
        del module._modules["parametrizations"]
        module.__class__ = plain_class


def folded(model: nn.Module) -> nn.Module:
    """The model itself if none of its tensors is computed, otherwise a copy with plain ones; see `fold`."""
    if not any(map(computed_names, model.modules())):
        return model
    plain = copy_of(model)
    fold(plain)
    return plain


@contextmanager
def redrawn(module: nn.Module) -> Iterator[None]:
    """Within the block, code may write into `module.<name>`, as initialisation does, also if it is computed.

    Afterwards, computed tensors start from what was written, as in a layer that is newly made with it.
    """
    names = computed_names(module)
    if not names:
        yield
        return
    with parametrize.cached():  # what is read now is the tensor that is written into
        yield
        drawn = {name: getattr(module, name).detach().clone() for name in names}
    with torch.no_grad():
        for name, value in drawn.items():
            computed = computation(module, name)
            assert computed is not None
            for original, new in zip(originals(computed), right_inverse(computed, value), strict=True):
                original.copy_(new)
            if is_spectral_norm(computed):
                norm = computed[0]
                norm._power_method(norm._reshape_weight_to_matrix(value), POWER_ITERATIONS)  # type: ignore[operator]


def _set(module: nn.Module, name: str, wanted: torch.Tensor, values: Callable[[], Sequence[torch.Tensor]]) -> None:
    """Write `values()` into the originals of `module.<name>`; they are as before if that does not make it `wanted`."""
    computed = computation(module, name)
    assert computed is not None
    before = [original.clone() for original in originals(computed)]
    try:
        for original, value in zip(originals(computed), values(), strict=True):
            original.copy_(value)
        wrong = "" if is_close(effective(module, name), wanted) else "it is none that this gives"
    except FAILURES as error:
        wrong = first_line(error)
    if wrong:
        for original, value in zip(originals(computed), before, strict=True):
            original.copy_(value)
        what = f"the {name} of a {type(module).__name__}, computed by {computed_by(computed)}"
        raise MorphError(f"{what}, cannot be set to this one: {wrong}")
