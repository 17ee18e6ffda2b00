"""The results of a network's calls on tensors without storage (the meta device): their shapes cost no computation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from morphtrain.morph.trace.kinds import KEEP_SHAPE
from morphtrain.morph.trace.traced import SAMPLES


class Evaluator(fx.Interpreter):
    """Runs calls on tensors without storage; the graph may still be growing."""

    def __init__(self, model: nn.Module, graph: fx.Graph, inputs: Sequence[Any] = ()) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False  # our messages are complete
        self.args_iter = iter(inputs)

    def so_far(self, node: fx.Node) -> Any:
        """The result of one of the calls that the graph has by now."""
        for n in self.graph.nodes:
            if n not in self.env:
                self.env[n] = self.evaluated(n)
        return self.env[node]

    def evaluated(self, n: fx.Node) -> Any:
        """The result of a call."""
        if n.op == "call_module":
            return super().run_node(n)
        with torch.device("meta"):  # for tensors that the code makes itself
            return super().run_node(n)

    def fetch_attr(self, target: str) -> Any:
        """A parameter or buffer, without storage."""
        value = super().fetch_attr(target)
        return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a module, computed with parameters and buffers without storage."""
        module = self.submodules[target]
        if isinstance(module, KEEP_SHAPE) and args:
            return args[0]  # norms are slow on the meta device
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        plain = [(m, k, v) for m in module.modules() for k, v in vars(m).items() if isinstance(v, torch.Tensor)]
        try:
            return functional_call(module, meta, args, kwargs)
        finally:
            for owner, name, tensor in plain:  # hooks may recompute these before a call, as the old weight norm does
                vars(owner)[name] = tensor


def samples_like(x: Any, number: int = SAMPLES) -> Any:
    """A batch of the same shape without storage, of this many samples."""
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty((number, *x.shape[1:]) if x.dim() else (), dtype=x.dtype, device="meta")
