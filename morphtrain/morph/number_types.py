"""Number formats of a network's tensors: which its inputs have, and what is computed in 32 bits whatever they have."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from morphtrain.morph.trace.kinds import MIXING, NORMS

SHORT = (torch.float16, torch.bfloat16)


def input_type(model: nn.Module) -> torch.dtype:
    """The type of the images that a model takes: that of its first convolution or linear layer's parameters.

    Norms may have another one: in a network of 16 bits they are often left in 32. Without such a layer it is that of
    the first parameter.
    """
    mixing = (parameter for m in model.modules() if isinstance(m, MIXING) for parameter in m.parameters())
    for parameter in itertools.chain(mixing, model.parameters()):
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.get_default_dtype()


def exact(x: torch.Tensor) -> torch.Tensor:
    """`x` in 32 bits or more; itself if it has them, or is no floating-point number."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def in_type(module: nn.Module, dtype: torch.dtype, besides: tuple[type[nn.Module], ...] = NORMS) -> nn.Module:
    """A module with its floating-point tensors cast to `dtype` in place, except for those of modules `besides`.

    Parameters stay the same objects, so that an optimizer keeps them.
    """
    for part in module.modules():
        if not isinstance(part, besides):
            tensors: Any = (*part.parameters(recurse=False), *part.buffers(recurse=False))
            for tensor in tensors:
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    return module
