"""Questions about the nodes of a `torch.fx` graph and about nested values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from morphtrain.morph.trace.labels import fixed

SUMS = ("add", "iadd", "add_")


def owner_path(n: fx.Node) -> str:
    """The path of the module whose code makes this call ("" for the model itself)."""
    stack = n.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def modules_around(n: fx.Node) -> list[str]:
    """The paths of the modules that were called around a call, outermost first, the model itself left out.

    For the call of a module, that module comes last. A ModuleList, or a Sequential whose layers are called one by one,
    is never called itself.
    """
    stack = n.meta.get("nn_module_stack")
    return [path for path, _ in stack.values() if path] if stack else []


def call_name(n: fx.Node) -> str:
    """The name of a call for an error message."""
    if n.op == "call_module":
        return f"module '{n.target}'"
    return f"operation '{name_of(n)}'"


def name_of(n: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a nested tuple, list or dict."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def holds_tensors(value: Any) -> bool:
    """Whether there is a tensor in a nested tuple, list or dict."""
    return next(tensors_in(value), None) is not None


def fixed_like(value: Any) -> Any:
    """Labels, nested like `value`, in which nothing can change."""
    return _map_tensors(value, lambda tensor: fixed(tensor.dim()))


def dimensions(wanted: Any, rank: int) -> list[int]:
    """The dimensions that an argument names; all of them if it names none (as in `var(False)`)."""
    if wanted is None or isinstance(wanted, bool) or wanted == ():
        return list(range(rank))
    return [d % rank for d in ([wanted] if isinstance(wanted, int) else wanted)]


def argument(n: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by position or by name."""
    return n.args[position] if len(n.args) > position else n.kwargs.get(name, default)


def first(n: fx.Node, name: str = "input") -> fx.Node:
    """The first argument of a call, which is a node."""
    node: fx.Node = argument(n, 0, name)
    return node


def _map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """A value of the same nesting, with `function` applied to every tensor and None for everything else."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return tuple(_map_tensors(part, function) for part in value)
    if isinstance(value, dict):
        return {key: _map_tensors(part, function) for key, part in value.items()}
    return None
