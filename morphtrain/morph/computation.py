"""What stands behind a tensor that `torch.nn.utils.parametrize` computes: where it starts from, and by which steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

# What a parametrisation of the user's own may raise where a value does not fit it.
FAILURES = (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError, AssertionError)
EXACT = 0.7  # share of the digits of its number format that a computed weight has in common with the wanted one


def computed_names(module: nn.Module) -> list[str]:
    """The names of the tensors of `module` that are computed.

    (`parametrize.is_parametrized` asks for an attribute, which a wrapper may pass on from the layer inside.)
    """
    held = module._modules.get("parametrizations")
    found = held.items() if isinstance(held, nn.ModuleDict) else ()
    return [name for name, computed in found if isinstance(computed, ParametrizationList)]


def computation(module: nn.Module, name: str) -> ParametrizationList | None:
    """What computes `module.<name>`; None if it is a plain tensor."""
    if name not in computed_names(module):
        return None
    found: ParametrizationList = module._modules["parametrizations"][name]  # type: ignore[index]
    return found


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module without the one that computed tensors put in front."""
    return type(module).__bases__[0] if computed_names(module) else type(module)


def original_names(computed: ParametrizationList) -> list[str]:
    """The names of the tensors that a computation starts from."""
    return ["original"] if computed.is_tensor else [f"original{i}" for i in range(computed.ntensors)]


def originals(computed: ParametrizationList) -> list[torch.Tensor]:
    """The tensors that a computation starts from."""
    return [getattr(computed, name) for name in original_names(computed)]


def tensors_behind(computed: ParametrizationList) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a computation, by name."""
    return {**dict(computed.named_parameters()), **dict(computed.named_buffers())}


def has_dim(tensor: torch.Tensor, weight: torch.Tensor, dim: int) -> bool:
    """Whether a tensor behind `weight` has an entry for each of the weight's along `dim`, as a scale of rows has."""
    pairs = zip(tensor.shape, weight.shape, strict=False)
    broadcast = tensor.dim() == weight.dim() and all(size in (1, whole) for size, whole in pairs)
    return tensor.shape == weight.shape or (broadcast and tensor.shape[dim] > 1)


def is_weight_norm(computed: ParametrizationList) -> bool:
    """Whether a computation is torch's weight norm, or one derived from it, alone: of g and v, g * v / ||v||."""
    return len(computed) == 1 and isinstance(computed[0], _WeightNorm)


def norm_dim(computed: ParametrizationList) -> int:
    """The dimension that a weight norm has a norm for each entry of; -1: one norm of the whole weight."""
    dim: int = computed[0].dim  # type: ignore[assignment]
    return dim


def is_spectral_norm(computed: ParametrizationList) -> bool:
    """Whether a computation is torch's spectral norm alone: of W, W / sigma(W). That of a vector has no state."""
    return len(computed) == 1 and type(computed[0]) is _SpectralNorm and hasattr(computed[0], "_u")


def is_known(computed: ParametrizationList) -> bool:
    """Whether a computation is one of torch's norms itself, which need not be tried out."""
    return is_spectral_norm(computed) or (len(computed) == 1 and type(computed[0]) is _WeightNorm)


def computed_by(computed: ParametrizationList) -> str:
    """The names of a computation's steps, for messages."""
    return ", ".join(type(step).__name__.lstrip("_") for step in computed)


@torch.no_grad()
def inverse(computed: ParametrizationList, weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """Originals from which `weight` is computed, if there are any; the computation is left as it is."""
    if is_weight_norm(computed):
        return _weight_norm_inverse(computed, weight)
    return right_inverse(copy.deepcopy(computed), weight)


@torch.no_grad()
def right_inverse(computed: ParametrizationList, weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """The originals that a newly made computation of `weight` has; a step without a `right_inverse` passes it on.

    Some steps keep what they need (orthogonal its base).
    """
    value: torch.Tensor | Sequence[torch.Tensor] = weight
    for step in reversed(list(computed)):
        if hasattr(step, "right_inverse"):
            value = step.right_inverse(value)  # type: ignore[operator]
    return [value] if isinstance(value, torch.Tensor) else list(value)


def is_close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors are the same up to rounding, wherever `wanted` is finite."""
    if found.shape != wanted.shape:
        return False
    finite = wanted.isfinite()
    wanted, differs = wanted[finite], (found - wanted)[finite].abs()
    return not len(wanted) or bool(differs.max() <= torch.finfo(wanted.dtype).eps ** EXACT * wanted.abs().max())


def _weight_norm_inverse(computed: ParametrizationList, weight: torch.Tensor) -> list[torch.Tensor]:
    """g and v of `weight`, with the norms that v has now, and the signs of g."""
    (g, v), dim = originals(computed), norm_dim(computed)
    length, before = torch.norm_except_dim(weight, 2, dim), torch.norm_except_dim(v, 2, dim)
    signed = torch.where(g < 0, -length, length)
    direction = weight * (torch.where(before > 0, before, length) / signed)  # not a number where it is not used
    return [signed, torch.where(length > 0, direction, torch.where(before > 0, v, 1.0))]
