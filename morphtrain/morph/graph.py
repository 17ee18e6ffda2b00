"""The one operation on channel spaces, reindexing, and the removal of blocks."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain.morph.layers import NoChannels, ZeroBranch
from morphtrain.morph.spaces import Axis, Pick, Segment, Slot, Space, divide
from morphtrain.morph.surgery.architecture import refresh_widths
from morphtrain.morph.surgery.gates import Gate, insert_gate
from morphtrain.morph.surgery.indexing import multiplicity, rows_of, scale_of
from morphtrain.morph.surgery.insert import Start, insert_block, insert_layers
from morphtrain.morph.surgery.rebind import Change, Rebinder, Shared
from morphtrain.morph.trace.branches import CONVOLUTIONS, Block, Branch, find_blocks
from morphtrain.morph.trace.calls import Call, layer_calls
from morphtrain.morph.trace.points import Point, find_places
from morphtrain.morph.trace.propagator import MorphError, trace_channels

Index = Sequence[int] | torch.Tensor


class ChannelGraph:
    """The channel spaces of a model, kept up to date while they are changed."""

    axes: list[Axis]
    spaces: list[Space]
    blocks: list[Block]
    picks: list[Pick]
    shared: Shared
    layer_places: list[str]  # convolutions that `insert_layer` can put a layer in front of
    block_places: dict[str, Point]  # modules that `insert_block` can put a block behind
    stage_ends: list[Point]  # of these, the last of every stage
    calls: list[Call]  # of every layer, each time it is called

    def __init__(self, model: nn.Module, example_input: Any = None, ignore: Sequence[str] = ()) -> None:
        self.model = model
        self.example_input = example_input
        self.ignore = tuple(ignore)
        self.axes, self.spaces, self.blocks, self.picks = [], [], [], []
        self.layer_places, self.block_places, self.stage_ends = [], {}, []
        self.shared, self.calls = {}, []

    def _read(self) -> None:
        trace = trace_channels(self.model, self.example_input, self.ignore)
        modules = dict(self.model.named_modules())
        self.layer_places, self.block_places, self.stage_ends = find_places(trace, modules)
        self.calls = layer_calls(trace.nodes, modules)
        self.axes, self.spaces, self.picks = divide(trace)
        self.shared = trace.shared
        self.blocks = find_blocks(trace, modules, self.spaces)

    @classmethod
    def trace(cls, model: nn.Module, example_input: Any, ignore: Sequence[str] = ()) -> ChannelGraph:
        """Find the channel spaces of `model`.

        Args:
            example_input: one batch it accepts, with the batch in dimension 0 (a batch of one will do); for a model
                of several inputs a tuple of them. Only shapes and types count, nothing is computed.
            ignore: patterns of module paths (`fnmatch`: "head", "stages.*.attention") that are not looked into. They
                keep their shapes, and so do the channels that enter and leave them.

        Raises:
            MorphError: naming the operation, module path and source line of what cannot be followed.
        """
        graph = cls(model, example_input, ignore)
        graph._read()
        return graph

    @classmethod
    def untraced(cls, model: nn.Module) -> ChannelGraph:
        """A graph without spaces: nothing of `model` can be changed."""
        return cls(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> ChannelGraph:
        """The graph of a copy of the model."""
        twin = copy.copy(self)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        # Modules that share tensors are known by their ids, and those are others now.
        twin.shared = {(id(memo[owner]), name): names for (owner, name), names in twin.shared.items()}
        return twin

    def __repr__(self) -> str:
        return "\n".join([f"ChannelGraph of {type(self.model).__name__}:", *map(repr, self.spaces)])

    def space(self, name: str) -> Space:
        """The space of this name; a KeyError lists those there are."""
        for space in self.spaces:
            if space.name == name:
                return space
        raise KeyError(f"no channel space '{name}'; there are {', '.join(s.name for s in self.spaces)}")

    def reindex(self, space: Space, index: Index, optimizer: Optimizer | None = None) -> None:
        """Make row j of `space` what row `index[j]` was, in every tensor that has a part in it.

        Dropping entries prunes. Repeating entries widens and keeps the function: consumers are divided by the
        multiplicity (Net2Net, Chen et al. 2015, eq. 2.4), and so is the momentum of consumers. Optimizer state of a
        parameter's shape follows. Mode, `requires_grad`, dtype, device, memory format and parameter-group membership
        are kept. Gradients of the changed parameters are dropped: call it between two steps.

        Raises:
            MorphError: before anything is changed, if an entry is out of range, an axis would be left empty, or a
                single channel that has several entries would be repeated (in which order?).
        """
        self.reindex_spaces({space: index}, optimizer)

    def reindex_spaces(self, changes: Mapping[Space, Index], optimizer: Optimizer | None = None) -> None:
        """`reindex` several spaces at once: every tensor is made anew once, not once for each of its sides."""
        indices = {space: self._checked(space, index) for space, index in changes.items()}
        self._check_emptied([space for space, index in indices.items() if len(index) == 0])
        divisors = {space: d for space, index in indices.items() if (d := multiplicity(space, index)) is not None}
        axes = list(dict.fromkeys(slot.axis for space in indices for slot in space.slots))
        rebinder = Rebinder(self.shared, optimizer)
        tensors: dict[tuple[int, str], tuple[nn.Module, list[Change]]] = {}
        for axis in axes:
            rows = rows_of(axis, indices)
            scale = scale_of(axis, indices, divisors) if axis.role == "consumes" else None
            for name, dim in axis.tensors:
                _, sides = tensors.setdefault((id(axis.module), name), (axis.module, []))
                sides.append(Change(dim, rows, scale))
        for (_, name), (module, sides) in tensors.items():
            rebinder.reindex(module, name, sides)
        for space, index in indices.items():
            space.size = len(index)
            if space.size == 0:
                self._drop_space(space)
        self._refresh(axes)

    def can_remove(self, block: Block) -> bool:
        """Whether `remove_block` would do it: not if all that is concatenated somewhere would be gone."""
        gone = self._axes_in(block.branch)
        emptied = block.outputs if block.kind == "cat" else []
        return block in self.blocks and not any(any(self._emptied(s, emptied, gone)) for s in emptied)

    def remove_block(self, block: Block, optimizer: Optimizer | None = None) -> None:
        """Take a branch out.

        Of a sum: what its last norm adds for zeros stays, the convolutions go. The network computes what it did, in
        both modes, if the last of `block.spaces` had no live consumer: then the last convolution gave zeros. Sums with
        a downsampling shortcut keep that shortcut. Of a concatenation: its channels go, from wherever they were used.

        Raises:
            MorphError: before anything is changed, if `block` is not (or no longer) one of `self.blocks`, or if what
                uses its channels would have no channel left.
        """
        if block not in self.blocks:
            raise MorphError(f"'{block.path}' is not a removable block of this graph")
        branch = block.branch
        gone = self._axes_in(branch)
        if block.kind == "cat":
            self._check_emptied(block.outputs, without=gone)
        remainder = self._remainder(block)
        place = branch.path or (branch.norm if block.kind == "sum" else "") or branch.last
        remainder.training = self.model.get_submodule(place).training
        before = [p for path in branch.parts for p in self.model.get_submodule(path).parameters()]
        for path in branch.parts:
            self.model.set_submodule(path, remainder if path == place else NoChannels())
        if optimizer is not None:
            left = set(self.model.parameters())
            Rebinder({}, optimizer).forget([p for p in before if p not in left])
        self.blocks = [b for b in self.blocks if b is not block and not set(b.branch.layers) & set(branch.layers)]
        if isinstance(remainder, ZeroBranch):
            self._take_over(gone, branch, remainder, place)
        for axis in gone:
            if not isinstance(remainder, ZeroBranch) or axis.module is not remainder.norm:
                self._drop_axis(axis)
        if block.kind == "cat":
            self.reindex_spaces({space: [] for space in block.outputs}, optimizer)
        self.spaces = [space for space in self.spaces if space.slots]

    def gate(self, gates: Mapping[str, Gate], optimizer: Optimizer | None = None) -> None:
        """Let convolutions read and write only some of their neighbours' channels (channel gating, Lym et al. 2019).

        The convolution at each path loses the weights of the other channels; a layer that selects its inputs, or one
        that scatters its outputs between zeros, is put beside it. Exact where the lost weights are zero. Spaces and
        blocks are found anew: those held from before are no longer part of this graph.

        Raises:
            MorphError: before anything is changed, if a path is not that of an ungrouped convolution, or one with a
                bias is to write less.
        """
        modules = dict(self.model.named_modules())
        for path, gate in gates.items():
            module = modules.get(path)
            if not isinstance(module, CONVOLUTIONS) or module.groups != 1:
                raise MorphError(f"'{path}' cannot be gated: it is not a convolution of one group")
            if gate.writes is not None and module.bias is not None:
                raise MorphError(f"'{path}' cannot be gated: its bias would be lost where it no longer writes")
        rebinder = Rebinder(self.shared, optimizer)
        for path, gate in gates.items():
            insert_gate(self.model, path, gate, rebinder)
        self._read()

    def insert_layer(
        self,
        path: str | Sequence[str],
        calibration: Sequence[Any] = (),
        *,
        kernel: int = 3,
        optimizer: Optimizer | None = None,
    ) -> list[str]:
        """Put an identity convolution, with norm and ReLU, in front of the convolution at `path`.

        In evaluation mode the network computes what it did; in training too, but for how much a batch's statistics
        deviate from those of all `calibration` batches. A network without batch norm gets none here. New parameters
        join the optimizer's groups beside those of the convolution. Spaces and blocks are found anew: those held from
        before are no longer part of this graph.

        Args:
            path: one of `layer_places`, or several.
            calibration: inputs of the model, the norms' statistics are measured on them.
            kernel: odd.

        Returns:
            the paths of the new layers.

        Raises:
            MorphError: before anything is changed.
        """
        paths = [path] if isinstance(path, str) else list(path)
        for place in paths:
            if place not in self.layer_places:
                raise MorphError(f"no layer can be put in front of '{place}': {self._why_no_layer(place)}")
        paths.sort(key=self.layer_places.index)
        inserted = insert_layers(self.model, paths, calibration, kernel, Rebinder({}, optimizer))
        self._read()
        return inserted

    def insert_block(
        self,
        path: str,
        calibration: Sequence[Any] = (),
        *,
        kernels: Sequence[int] = (3, 3),
        inner: int | None = None,
        start: Start = "zero_gamma",
        optimizer: Optimizer | None = None,
    ) -> str:
        """Put a residual block that changes nothing behind the module at `path`.

        A Sequential that ends with this module becomes longer, elsewhere a `Grown` takes its place. Spaces and blocks
        are found anew: those held from before are no longer part of this graph.

        Args:
            path: a key of `block_places`; `stage_ends` are those at the ends of stages.
            calibration: inputs of the model; "half_half" measures its norms' statistics on them.
            kernels: of the block's convolutions, odd.
            inner: channels between them; None: those of the output, which "half_half" needs.
            start: "zero_gamma": the last norm's gamma is zero, the branch adds nothing in either mode. "half_half": the
                branch is an identity, and it and the shortcut count half each; as exact as `insert_layer`.
            optimizer: the new parameters join its groups.

        Returns:
            the path of the new block.

        Raises:
            MorphError: before anything is changed; "half_half" needs a place behind a ReLU.
        """
        if path not in self.block_places:
            known = ", ".join(point.path for point in self.stage_ends) or "none"
            raise MorphError(f"no block can be put behind '{path}'; the ends of stages are: {known}")
        self._read()  # widths may have changed since
        rebinder = Rebinder({}, optimizer)
        inserted = insert_block(self.model, self.block_places[path], calibration, kernels, inner, start, rebinder)
        self._read()
        return inserted

    def _why_no_layer(self, path: str) -> str:
        if not isinstance(dict(self.model.named_modules()).get(path), nn.Conv2d):
            known = ", ".join(self.layer_places) or "none"
            return f"it is not a two-dimensional convolution; there are: {known}"
        return "what enters it may be negative (an identity needs values behind a ReLU), or it is used several times"

    def _remainder(self, block: Block) -> nn.Module:
        """What stands in for a removed branch."""
        branch = block.branch
        if block.kind == "cat":
            return NoChannels(branch.stride)
        stride = branch.stride if branch.in_full else None
        last: Any = self.model.get_submodule(branch.last)
        if not branch.norm:
            return ZeroBranch(last.out_channels, bias=last.bias, stride=stride)
        norm: Any = self.model.get_submodule(branch.norm)
        channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
        if last.bias is not None and getattr(norm, "running_mean", None) is not None:
            norm.running_mean -= last.bias.detach()  # the norm's input is zero from now on, and was the bias
        return ZeroBranch(channels, norm, stride=stride)

    def _take_over(self, gone: Sequence[Axis], branch: Branch, remainder: ZeroBranch, path: str) -> None:
        """Let what is left of a branch have the axes that its last layers had."""
        for axis in gone:
            if axis.module is remainder.norm:
                axis.path = f"{path}.norm"
        outputs = next(
            a
            for a in gone
            if (a.module is remainder.norm and a.counter in ("num_features", "num_channels"))
            or (remainder.norm is None and a.path == branch.last and a.role == "produces")
        )
        tensors = (("bias", 0),) if remainder.bias is not None else ()
        axis = Axis(path, remainder, "elementwise", tensors, "channels", [])
        for segment in outputs.segments:
            axis.segments.append(Segment(segment.space, segment.span, segment.fixed_size))
            if segment.space:
                segment.space.slots.append(Slot(axis, axis.segments[-1]))
        self.axes.append(axis)

    def _refresh(self, axes: Sequence[Axis]) -> None:
        """Bring what modules keep beside their tensors up to date: widths, and the indices of picks."""
        for axis in axes:
            if axis.counter:
                setattr(axis.module, axis.counter, axis.length)
        for axis in axes:
            refresh_widths(axis.module)
        changed = set(axes)
        for pick in self.picks:
            if pick.source in changed or pick.picked in changed:
                pick.refresh()

    def _checked(self, space: Space, index: Index) -> torch.Tensor:
        if space not in self.spaces:
            raise MorphError(f"'{space.name}' is not (or no longer) a channel space of this graph")
        index = torch.as_tensor(index, device="cpu")
        if index.dim() != 1:
            raise MorphError(f"index for '{space.name}' must be one-dimensional, not of shape {tuple(index.shape)}")
        if len(index) and (index.dtype is torch.bool or index.is_floating_point()):
            raise MorphError(
                f"index for '{space.name}' must hold positions, not {index.dtype}; of a mask, its nonzero()"
            )
        index = index.long()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < space.size:
            raise MorphError(
                f"index for '{space.name}' must lie in 0..{space.size - 1}, not {int(index.min())}..{int(index.max())}"
            )
        if len(index) > 1 and space.is_ambiguous:
            raise MorphError(f"'{space.name}' cannot be widened: its single channel stands in several places")
        return index

    def _check_emptied(self, spaces: Collection[Space], without: Sequence[Axis] = ()) -> None:
        for space in spaces:
            for axis in self._emptied(space, spaces, without):
                raise MorphError(f"'{space.name}' cannot be emptied: {axis.path} would have no channel left")

    def _emptied(self, space: Space, spaces: Collection[Space], without: Sequence[Axis]) -> Iterator[Axis]:
        """Axes of `space`, but for those `without`, that would have no entry left if all of `spaces` were emptied."""
        for axis in dict.fromkeys(slot.axis for slot in space.slots):
            rest = [s for s in axis.segments if s.space not in spaces and s.length]
            if axis.tensors and not rest and axis not in without:
                yield axis

    def _axes_in(self, branch: Branch) -> list[Axis]:
        return [axis for axis in self.axes if branch.holds(axis.path)]

    def _drop_space(self, space: Space) -> None:
        self.spaces.remove(space)
        for slot in space.slots:
            slot.axis.segments.remove(slot.segment)

    def _drop_axis(self, axis: Axis) -> None:
        self.axes.remove(axis)
        for segment in axis.segments:
            if segment.space:
                segment.space.slots = [slot for slot in segment.space.slots if slot.axis is not axis]
        self.picks = [pick for pick in self.picks if axis not in (pick.source, pick.picked)]
