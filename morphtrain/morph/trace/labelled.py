"""A network's calls with the labels of their results: what the rules read, and what they write to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from morphtrain.morph.effective import identity
from morphtrain.morph.errors import MorphError
from morphtrain.morph.layers import OWN_LAYERS
from morphtrain.morph.paths import matches
from morphtrain.morph.spaces import Role, Tensors
from morphtrain.morph.trace.computed import ComputedWeights
from morphtrain.morph.trace.counts import Count
from morphtrain.morph.trace.labels import Joins, along, fixed, varies
from morphtrain.morph.trace.nodes import call_name, owner_path, tensors_in
from morphtrain.morph.trace.recording import Recording
from morphtrain.morph.trace.traced import OUTPUT, Shared, Trace, TracedAxis, TracedGather


class LabelledGraph:
    """The calls of a network as far as they have been followed.

    The propagator adds the value and the labels of each call. The rules look up the labels of a call's inputs, join
    them, register axes and gathers, and refuse calls that they cannot follow.

    Args:
        model: the traced network.
        recordings: of its forward.
        ignore: patterns of module paths that are not looked into.
        activations: what comes last in layers that are a norm with an activation, by its name.
        computed: what is known of the weights that are computed.
    """

    def __init__(
        self,
        model: nn.Module,
        recordings: Sequence[Recording],
        ignore: Sequence[str],
        activations: Mapping[nn.Module, str],
        computed: ComputedWeights,
    ) -> None:
        self.model = model
        self.recordings = recordings
        self.ignore = ignore
        self.activations = activations
        self.computed = computed
        self.modules = dict(model.named_modules())
        self.values: dict[fx.Node, Any] = {}  # results of the calls; tensors without storage
        self.labels: dict[fx.Node, Any] = {}  # of tensors; for tuples of tensors, tuples of labels
        self.counts: dict[fx.Node, Any] = {}  # of numbers that depend on numbers of channels; of shapes, a tuple
        self.constants: list[tuple[fx.Node, Count, str]] = []  # numbers that calls need to stay as they are
        self.joins = Joins()
        self.axes: dict[tuple[int, str], TracedAxis] = {}  # by module and place in it
        self.gathers: dict[int, TracedGather] = {}  # by module
        self.tensor_axes: dict[tuple[int, int], TracedAxis] = {}  # by tensor and dimension
        self.tensor_sizes: dict[tuple[int, int], torch.Tensor] = {}  # labels of the sizes that code reads, likewise
        self.holders = _holders(model)

    # -- questions about a call -------------------------------------------------------------------------------

    def shape(self, n: fx.Node) -> torch.Size:
        """The shape of a call's result, which must be a tensor."""
        shape: torch.Size = self.values[n].shape
        return shape

    def concrete(self, argument: Any) -> Any:
        """An argument of a call, with nodes replaced by their values."""
        return fx.node.map_arg(argument, lambda a: self.values[a])

    def count(self, argument: Any) -> Count | None:
        """How a number that is an argument of a call depends on numbers of channels; None if it does not."""
        count = self.counts.get(argument) if isinstance(argument, fx.Node) else None
        return count if isinstance(count, Count) else None

    def counts_of(self, n: fx.Node) -> list[Count]:
        """The numbers of channels that a number, or a shape, depends on."""
        found = self.counts.get(n)
        return [c for c in (found if isinstance(found, tuple) else (found,)) if c is not None]

    def is_width(self, n: fx.Node) -> bool:
        """Whether a number, or a shape, depends on how many channels something has."""
        return bool(self.counts_of(n))

    def size(self, n: fx.Node, dim: int) -> Count | None:
        """What the size of an activation or of a parameter along `dim` counts; None if it does not change."""
        rank = len(self.shape(n))
        if n.op == "get_attr" and self.shape(n).numel() > 1:
            return Count(self._size_labels(n, dim % rank))
        if not self.has_channels(n, dim):
            return None
        labels = self.labels[n].movedim(dim, 0)
        labels = labels.reshape(len(labels), -1)
        if labels.shape[1] > 1:
            roots = self.joins.roots()[labels]
            if bool((roots == roots[:1]).all()):
                return None  # of several dimensions that the channels are in, one whose size the code gives
        return Count(labels[:, 0])

    def shape_counts(self, n: fx.Node) -> tuple[Count | None, ...]:
        """`size` along every dimension."""
        return tuple(self.size(n, dim) for dim in range(len(self.shape(n))))

    def has_channels(self, n: Any, dim: int) -> bool:
        """Whether channels may lie in dimension `dim` of an activation; a single one may lie in any of size 1."""
        labels = self.labels.get(n)
        if not isinstance(labels, torch.Tensor):
            return False
        return varies(labels, dim) or (self.shape(n)[dim] == 1 == labels.numel() and bool(labels.any()))

    def is_fixed(self, n: fx.Node) -> bool:
        """Whether nothing about the result of a call can change."""
        return not self.is_width(n) and all(not bool(t.any()) for t in tensors_in(self.labels.get(n)))

    def has_weights(self, n: fx.Node) -> bool:
        """Whether a call has parameters, whose own channels may change even if those of its inputs cannot."""
        if n.op == "call_module":
            module = self.modules[str(n.target)]
            return isinstance(module, OWN_LAYERS) or next(module.parameters(), None) is not None
        return any(a.op == "get_attr" for a in n.all_input_nodes)

    def line(self, node: fx.Node, dim: int) -> torch.Tensor:
        """(N,): the labels along `dim` of the activation `node`, which its user takes for channels.

        Where they depend on other dimensions too, as after linear(x).view(-1, C, 2, 2), what lies at the same place in
        `dim` changes together. Channels that are elsewhere cannot change.
        """
        labels, size = self.labels[node], self.shape(node)[dim]
        lines = labels.movedim(dim, 0).reshape(labels.shape[dim], -1)
        if lines.shape[1] > 1:
            roots = self.joins.roots()[lines]
            rows = torch.arange(len(lines))[:, None] * (self.joins.count + 1) + roots
            if len(lines) == 1 or len(rows.unique()) > len(roots.unique()):  # the same channel at several places
                self.joins.pin(labels)
                return fixed(1).expand(size)
            self.joins.tie(lines, 1)
        return lines[:, 0].expand(size)

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

    def need_constant(self, n: fx.Node, numbers: Iterable[Count], what: str) -> None:
        """Note that a call is only followed if these numbers of channels turn out never to change."""
        self.constants += [(n, count, what) for count in numbers]

    def pin_counts(self, counts: Iterable[Count | None]) -> None:
        """Pin the channels that numbers count."""
        for count in counts:
            if count is not None:
                self.joins.pin(count.labels)

    def fit(self, labels: torch.Tensor, count: Count) -> None:
        """Join channels such that there always are as many as a number says.

        If it is p/q times the number of channels that it counts, these are joined in q equal parts, and `labels` are p
        more such parts. What does not fit is pinned.

        Args:
            labels: (M,), of the channels.
        """
        ratio = count.ratio or Fraction(0)
        if ratio <= 0 or len(count.labels) * ratio != len(labels):
            self.joins.pin(labels)
            self.joins.pin(count.labels)
            return
        parts = count.labels.view(ratio.denominator, -1)
        self.joins.tie(parts, 0)
        self.joins.join(labels.view(ratio.numerator, -1), parts[:1])

    def changes_with(self, count: Count, labels: torch.Tensor) -> bool:
        """Whether a number stays in proportion to the number of the channels `labels`, as far as is known now."""
        if count.ratio is None:
            return False
        if torch.equal(count.labels, labels):
            return True
        roots = self.joins.roots()
        (a, times_a), (b, times_b) = (roots[x].unique(return_counts=True) for x in (count.labels, labels))
        return torch.equal(a, b) and len(times_a.unique()) == len(times_b.unique()) == 1

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
        own = self._unregistered(module, role, tensors, labels)
        axis = TracedAxis(path, module, role, own, labels, counter)
        self.axes[id(module), place] = axis
        for name, dim in own:
            self.tensor_axes[identity(module, name), dim] = axis
            axis.narrowing |= name == "weight" and (id(module), dim) in self.computed.narrowing
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
        if isinstance(owner, ParametrizationList):
            self.pin_computed(owner)
            return fixed(value.dim())
        long = [d for d, size in enumerate(value.shape) if size > 1]
        if len(long) != 1 or (name not in owner._parameters and name not in owner._buffers):
            return fixed(value.dim())
        labels = self.joins.fresh(value.shape[long[0]])
        labels = self.axis(str(n.target), owner, name, "elementwise", ((name, long[0]),), labels)
        return along(labels, long[0], value.dim())

    def pin_values(self, n: fx.Node) -> None:
        """Pin every dimension of a parameter that has several and whose values code computes with."""
        if n.op == "get_attr" and not bool(self.labels[n].any()):
            for dim in range(len(self.shape(n))):
                self.joins.pin(self._size_labels(n, dim))

    def _size_labels(self, n: fx.Node, dim: int) -> torch.Tensor:
        """(N,): the labels along a dimension of a parameter, which may be known only later."""
        path, _, name = str(n.target).rpartition(".")
        key = (identity(self.model.get_submodule(path), name), dim)
        if key in self.tensor_axes:
            return self.tensor_axes[key].labels
        if key not in self.tensor_sizes:
            self.tensor_sizes[key] = self.joins.fresh(self.shape(n)[dim])
        return self.tensor_sizes[key]

    def pin_computed(self, computed: ParametrizationList) -> None:
        """Pin both sides of a computed weight that code reads, perhaps before its layer is called."""
        for dim, size in enumerate(computed().shape):
            key = (id(computed), dim)
            known = self.tensor_axes.get(key)
            labels = self.tensor_sizes.setdefault(key, self.joins.fresh(size)) if known is None else known.labels
            self.joins.pin(labels)

    def refuse(self, n: fx.Node, what: str) -> NoReturn:
        """Raise a MorphError that names `what`, the module and the line of the model's code."""
        recording = next(r for r in self.recordings if r.graph is n.graph)
        place = owner_path(n) or "the model"
        raise MorphError(f"cannot follow channels through {what} in {place} ({recording.source_line(n)})")

    # -- the result -------------------------------------------------------------------------------------------

    def result(self) -> Trace:
        """The trace, once all calls of all recordings have been followed."""
        self._pin_reads()
        roots = self.joins.roots()
        kept = self._kept(roots)
        lines = [roots[axis.labels] for axis in self.axes.values()]
        changing = torch.cat(lines).unique() if lines else roots[:1]
        for n, count, what in self.constants:
            if bool(torch.isin(roots[count.labels], changing[changing != 0]).any()):
                self.refuse(n, what)
        training, evaluation = self.recordings[0].graph, self.recordings[-1].graph
        return Trace(
            nodes=list(training.nodes),
            evaluation=list(evaluation.nodes),
            axes=list(self.axes.values()),
            gathers=list(self.gathers.values()),
            labels=self.labels,
            roots=roots,
            shared=self._shared(),
            kept=kept,
            odd_calls=set().union(*(recording.odd_calls for recording in self.recordings)),
            activations=self.activations,
        )

    def _kept(self, roots: torch.Tensor) -> dict[str, str]:
        """By the path of a layer that makes channels which cannot change: how many, and why."""
        found = {}
        classes, first = self.joins.first_pins()
        for axis in self.axes.values():
            labels = axis.labels[roots[axis.labels] == 0]
            if axis.role == "produces" and axis.tensors and len(labels):
                by = min(int(first[classes[labels]].min()), len(self.joins.callers) - 1)
                number = f"{len(labels)} of {len(axis.labels)} channels" if len(labels) < len(axis.labels) else "all"
                found[axis.path] = f"{number}: {self._reason(self.joins.callers[by])}"
        return found | {path: f"all: {why}" for path, why in self.computed.kept.items()}

    def _reason(self, by: Any) -> str:
        if not isinstance(by, fx.Node):
            return str(by or "")
        if by.op == "output":
            return OUTPUT
        if by.op == "call_module":
            return f"{call_name(by)} ({type(self.modules[str(by.target)]).__name__})"
        place = owner_path(by)
        return f"{call_name(by)} in {place or 'the forward of the model'}"

    def _pin_reads(self) -> None:
        """Pin the widths of layers that code reads as attributes: what it does with them is not known."""
        for recording in self.recordings:
            for module, name in recording.reads:
                role = {"in": "consumes", "out": "produces"}.get(name.partition("_")[0])
                axes = [axis for axis in self.axes.values() if axis.module is module]
                self.joins.caller = f"code reads {name}"
                for axis in [axis for axis in axes if axis.role == role] or axes:
                    self.joins.pin(axis.labels)

    def _unregistered(self, module: nn.Module, role: Role, tensors: Tensors, labels: torch.Tensor) -> Tensors:
        """The tensors of a new axis that no other axis has; `labels` are joined with those of the others."""
        own = []
        for name, dim in tensors:
            if getattr(module, name, None) is None:
                continue
            tensor = identity(module, name)
            known = self.tensor_axes.get((tensor, dim))
            if known is not None:
                self.joins.join(known.labels, labels)
                known.two_sided |= (known.role == "consumes") != (role == "consumes")
            else:
                own.append((name, dim))
            if (tensor, dim) in self.tensor_sizes:
                self.joins.join(self.tensor_sizes[tensor, dim], labels)
            if any(matches(path, self.ignore) for path, _, _ in self.holders.get(tensor, ())):
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
