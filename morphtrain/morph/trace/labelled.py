"""A network's calls with the labels of their results: what the rules read, and what they write to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import fx, nn

from morphtrain.morph.errors import MorphError
from morphtrain.morph.layers import OWN_LAYERS
from morphtrain.morph.paths import matches
from morphtrain.morph.spaces import Role, Tensors
from morphtrain.morph.trace.labels import Joins, along, fixed, varies
from morphtrain.morph.trace.nodes import call_name, owner_path, tensors_in
from morphtrain.morph.trace.recording import source_line
from morphtrain.morph.trace.traced import Shared, Trace, TracedAxis, TracedGather


class LabelledGraph:
    """The calls of a network as far as they have been followed.

    The propagator adds the value and the labels of each call. The rules look up the labels of a call's inputs, join
    them, register axes and gathers, and refuse calls that they cannot follow.

    Args:
        model: the traced network.
        ignore: patterns of module paths that are not looked into.
    """

    def __init__(self, model: nn.Module, ignore: Sequence[str]) -> None:
        self.model = model
        self.ignore = ignore
        self.modules = dict(model.named_modules())
        self.values: dict[fx.Node, Any] = {}  # results of the calls; tensors without storage
        self.labels: dict[fx.Node, Any] = {}  # of tensors; for tuples of tensors, tuples of labels
        self.widths: set[fx.Node] = set()  # numbers that depend on how many channels something has
        self.joins = Joins()
        self.axes: dict[tuple[int, str], TracedAxis] = {}  # by module and place in it
        self.gathers: dict[int, TracedGather] = {}  # by module
        self.tensor_axes: dict[tuple[int, int], TracedAxis] = {}  # by tensor and dimension
        self.holders = _holders(model)

    # -- questions about a call -------------------------------------------------------------------------------

    def shape(self, n: fx.Node) -> torch.Size:
        """The shape of a call's result, which must be a tensor."""
        shape: torch.Size = self.values[n].shape
        return shape

    def concrete(self, argument: Any) -> Any:
        """An argument of a call, with nodes replaced by their values."""
        return fx.node.map_arg(argument, lambda a: self.values[a])

    def is_width(self, n: fx.Node) -> bool:
        """Whether a number, or a shape, depends on how many channels something has."""
        sized, dims = n.meta.get("dims of", (None, ()))
        return n in self.widths or any(self.has_channels(sized, dim) for dim in dims)

    def has_channels(self, n: Any, dim: int) -> bool:
        """Whether channels may lie in dimension `dim` of an activation; a single one may lie in any of size 1."""
        labels = self.labels.get(n)
        if not isinstance(labels, torch.Tensor):
            return False
        return varies(labels, dim) or (self.shape(n)[dim] == 1 and bool(labels.any()))

    def is_fixed(self, n: fx.Node) -> bool:
        """Whether nothing about the result of a call can change."""
        return not self.is_width(n) and all(not bool(t.any()) for t in tensors_in(self.labels.get(n)))

    def has_weights(self, n: fx.Node) -> bool:
        """Whether a call has parameters, whose own channels may change even if those of its inputs cannot."""
        if n.op == "call_module":
            module = self.modules[str(n.target)]
            return isinstance(module, OWN_LAYERS) or next(module.parameters(), None) is not None
        return any(a.op == "get_attr" for a in n.all_input_nodes)

    def line(self, n: fx.Node, node: fx.Node, dim: int) -> torch.Tensor:
        """(N,): the labels along `dim` of the activation `node`, an input of `n`.

        Raises:
            MorphError: if the labels depend on another dimension too.
        """
        labels, shape = self.labels[node], self.shape(node)
        dim %= len(shape)
        if labels.numel() != labels.shape[dim]:
            self.refuse(n, f"{call_name(n)}: channels are not, or not only, in dimension {dim}")
        return labels.flatten().expand(shape[dim])

    # -- what a call does to channels -------------------------------------------------------------------------

    def pin_inputs(self, n: fx.Node) -> None:
        """Note that the channels of all inputs of a call cannot change."""
        for a in n.all_input_nodes:
            for labels in tensors_in(self.labels.get(a)):
                self.joins.pin(labels)

    def pin_varying(self, node: fx.Node, dims: Iterable[int]) -> bool:
        """Pin the channels of `node` if they lie in one of `dims`; returns whether they do."""
        mixes = any(self.has_channels(node, dim) for dim in dims)
        if mixes:
            self.joins.pin(self.labels[node])
        return mixes

    def axis(
        self,
        path: str,
        module: nn.Module,
        place: str,
        role: Role,
        tensors: Tensors,
        labels: torch.Tensor,
        counter: str | None = None,
    ) -> torch.Tensor:
        """Register an axis, or join it with the known one if the module was called before; returns its labels (N,).

        A tensor that several modules share is registered once, with the first of them.

        Args:
            path: of the module.
            place: tells the axes of one module apart.
            labels: (N,), of the axis' entries.
            counter: the module's attribute that holds N.
        """
        known = self.axes.get((id(module), place))
        if known is not None:
            self.joins.join(known.labels, labels)
            return known.labels
        own = self._unregistered(module, tensors, labels)
        axis = TracedAxis(path, module, role, own, labels, counter)
        self.axes[id(module), place] = axis
        for name, dim in own:
            self.tensor_axes[id(getattr(module, name)), dim] = axis
        return labels

    def gather(self, n: fx.Node, module: nn.Module, source: torch.Tensor, gathered: torch.Tensor) -> None:
        """Register a module that selects or scatters entries by an index."""
        path = str(n.target)
        counter = "width" if hasattr(module, "width") else None
        self.axis(path, module, "source", "elementwise", (), source, counter)
        self.axis(path, module, "gathered", "elementwise", (), gathered)
        axes = self.axes[id(module), "source"], self.axes[id(module), "gathered"]
        self.gathers[id(module)] = TracedGather(module, *axes)

    def parameter_labels(self, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
        """The labels of a parameter or buffer that code uses directly: a vector has channels, all else is fixed."""
        path, _, name = str(n.target).rpartition(".")
        owner = self.model.get_submodule(path)
        long = [d for d, size in enumerate(value.shape) if size > 1]
        if len(long) != 1 or (name not in owner._parameters and name not in owner._buffers):
            return fixed(value.dim())
        labels = self.joins.fresh(value.shape[long[0]])
        labels = self.axis(str(n.target), owner, name, "elementwise", ((name, long[0]),), labels)
        return along(labels, long[0], value.dim())

    def refuse(self, n: fx.Node, what: str) -> NoReturn:
        """Raise a MorphError that names `what`, the module and the line of the model's code."""
        place, line = owner_path(n) or "the model", source_line(self.model, self.ignore, n)
        raise MorphError(f"cannot follow channels through {what} in {place} ({line})")

    # -- the result -------------------------------------------------------------------------------------------

    def result(self, nodes: Iterable[fx.Node]) -> Trace:
        """The trace, once all `nodes` have been followed."""
        return Trace(
            nodes=list(nodes),
            axes=list(self.axes.values()),
            gathers=list(self.gathers.values()),
            labels=self.labels,
            roots=self.joins.roots(),
            shared=self._shared(),
        )

    def _unregistered(self, module: nn.Module, tensors: Tensors, labels: torch.Tensor) -> Tensors:
        """The tensors of a new axis that no other axis has; `labels` are joined with those of the others."""
        own = []
        for name, dim in tensors:
            tensor = getattr(module, name, None)
            if tensor is None:
                continue
            known = self.tensor_axes.get((id(tensor), dim))
            if known is not None:
                self.joins.join(known.labels, labels)
            else:
                own.append((name, dim))
            if any(matches(path, self.ignore) for path, _, _ in self.holders.get(id(tensor), ())):
                self.joins.pin(labels)
        return tuple(own)

    def _shared(self) -> Shared:
        several = [names for names in self.holders.values() if len(names) > 1]
        return {
            (id(module), name): [(m, other) for _, m, other in names if (m, other) != (module, name)]
            for names in several
            for _, module, name in names
        }


def _holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """id of a parameter or buffer -> (module path, module, name) wherever it is held."""
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append((path, module, name))
    return found
