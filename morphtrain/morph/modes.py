"""What a pass or a recording may change in a model, restored afterwards: its mode, buffers and attributes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)
_PLAIN = nn.Module()


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back into its present mode when the block ends, whatever the block does."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put the values of all buffers back when the block ends."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Put all attributes back when the block ends, and what their lists and dicts hold.

    torch.fx stores tensors of the code on the model, and code may store activations, which a recording replaces.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    held = [(v, v.copy()) for _, values in before for k, v in values.items() if _is_own(k) and type(v) in (list, dict)]
    try:
        yield
    finally:
        for attributes, values in before:
            attributes.clear()
            attributes.update(values)
        for container, content in held:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers of torch that compute what it computes (DataParallel, torch.compile)."""
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inside = model._modules.get("module" if parallel else "_orig_mod")
    return model if inside is None else unwrapped(inside)


def stored_activations(model: nn.Module) -> dict[int, torch.Tensor]:
    """What `copy.deepcopy` needs as its memo to copy a model that has stored activations: these, outside autograd."""
    found: dict[int, torch.Tensor] = {}
    waiting = [value for module in model.modules() for name, value in vars(module).items() if _is_own(name)]
    seen = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            found[id(value)] = value.detach()
        elif isinstance(value, (list, tuple, set, dict)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
    return found


def copy_of(model: Module) -> Module:
    """A deep copy of a model, which may have stored activations."""
    return copy.deepcopy(model, dict(stored_activations(model)))


def _is_own(name: str) -> bool:
    """Whether an attribute is not one that torch keeps in every module."""
    return name not in vars(_PLAIN)
