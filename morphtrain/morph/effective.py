"""Weights as the layers use them, whether they are parameters or computed from some (weight norm, spectral norm).

`torch.nn.utils.parametrize` gives a module a `weight` that is computed each time it is read. It is no parameter: it has
no `.grad`, what is written into it is lost, and reading it may change a state (spectral norm, in training mode, takes a
step of its power iteration). What asks for weights or changes them goes through here; for a plain parameter or buffer,
each function does the obvious thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from morphtrain.errors import first_line
from morphtrain.morph.errors import MorphError
from morphtrain.morph.modes import kept_modes

# What a parametrisation of the user's own may raise where a value does not fit it.
FAILURES = (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError, AssertionError)
ROUNDING = 32  # units in the last place of the largest entry, within which a computed weight is the wanted one


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
        by_length, by_direction = (torch.zeros_like(t) if t.grad is None else t.grad * t for t in (g, v))
        return by_direction + by_length * (v / torch.norm_except_dim(v, 2, dim)).square()
    if len(parameters) == 1 and parameters[0].grad is not None and parameters[0].shape == effective(module, name).shape:
        return parameters[0].grad * parameters[0]
    raise MorphError(f"the derivative by the {name} of a {type(module).__name__} is not known: it is computed")


def identity(module: nn.Module, name: str = "weight") -> int:
    """One number for what is one tensor in several modules (tied weights), computed or not."""
    computed = computation(module, name)
    return id(getattr(module, name) if computed is None else computed)


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Put plain tensors, of their present values, in the place of all that `torch.nn.utils.parametrize` computes.

    Tied weights stay tied. (`torch.nn.utils.parametrize.remove_parametrizations` would take the weight from every deep
    copy of the layer, too.)
    """
    plain: dict[int, torch.Tensor] = {}
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            key = identity(module, name)
            if key not in plain:
                value = effective(module, name).detach().clone()
                plain[key] = nn.Parameter(value, trained(module, name)) if parameters_of(module, name) else value
            held = module._parameters if isinstance(plain[key], nn.Parameter) else module._buffers
            held[name] = plain[key]  # type: ignore[assignment]
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]


# -- what stands behind a computed tensor ---------------------------------------------------------------------


def computation(module: nn.Module, name: str) -> ParametrizationList | None:
    """What computes `module.<name>`; None if it is a plain tensor."""
    if not parametrize.is_parametrized(module, name):
        return None
    found: ParametrizationList = module.parametrizations[name]  # type: ignore[index, assignment]
    return found


def original_names(computed: ParametrizationList) -> list[str]:
    """The names of the tensors that a computation starts from."""
    return ["original"] if computed.is_tensor else [f"original{i}" for i in range(computed.ntensors)]


def originals(computed: ParametrizationList) -> list[torch.Tensor]:
    """The tensors that a computation starts from."""
    return [getattr(computed, name) for name in original_names(computed)]


def is_weight_norm(computed: ParametrizationList) -> bool:
    """Whether a computation is torch's weight norm alone: of g and v, g * v / ||v||."""
    return len(computed) == 1 and type(computed[0]) is _WeightNorm


def is_spectral_norm(computed: ParametrizationList) -> bool:
    """Whether a computation is torch's spectral norm alone: of W, W / sigma(W). That of a vector has no state."""
    return len(computed) == 1 and type(computed[0]) is _SpectralNorm and hasattr(computed[0], "_u")


def norm_dim(computed: ParametrizationList) -> int:
    """The dimension that a weight norm has a norm for each entry of; -1: one norm of the whole weight."""
    dim: int = computed[0].dim  # type: ignore[assignment]
    return dim


def computed_by(computed: ParametrizationList) -> str:
    """The names of a computation's steps, for messages."""
    return ", ".join(type(step).__name__.lstrip("_") for step in computed)


@torch.no_grad()
def inverse(computed: ParametrizationList, weight: torch.Tensor) -> list[torch.Tensor]:
    """Originals from which `weight` is computed, if there are any; a step without `right_inverse` is taken for none."""
    if is_weight_norm(computed):
        return _weight_norm_inverse(computed, weight)
    value: torch.Tensor | Sequence[torch.Tensor] = weight
    for step in reversed(list(computed)):
        if hasattr(step, "right_inverse"):
            value = step.right_inverse(value)  # type: ignore[operator]
    return [value] if isinstance(value, torch.Tensor) else list(value)


def is_close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors are the same up to rounding; never, if one is not finite."""
    if found.shape != wanted.shape or not bool(found.isfinite().all()):
        return False
    if wanted.numel() == 0:
        return True
    return bool((found - wanted).abs().max() <= ROUNDING * torch.finfo(wanted.dtype).eps * wanted.abs().max())


def _weight_norm_inverse(computed: ParametrizationList, weight: torch.Tensor) -> list[torch.Tensor]:
    """g and v of `weight`, with the norms that v has now, and the signs of g."""
    (g, v), dim = originals(computed), norm_dim(computed)
    length, before = torch.norm_except_dim(weight, 2, dim), torch.norm_except_dim(v, 2, dim)
    signed = torch.where(g < 0, -length, length)
    direction = weight * (torch.where(before > 0, before, length) / signed)  # not a number where it is not used
    return [signed, torch.where(length > 0, direction, torch.where(before > 0, v, 1.0))]


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
