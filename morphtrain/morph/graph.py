"""`ChannelGraph`: the channel spaces of a model, and every change of structure that can be made to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain.morph.errors import MorphError
from morphtrain.morph.layers import ZeroBranch
from morphtrain.morph.modes import stored_activations, unwrapped
from morphtrain.morph.paths import is_within
from morphtrain.morph.spaces import Axis, ChannelGather, Space, new_names
from morphtrain.morph.surgery.gates import Gate, insert_gate, planned_gates
from morphtrain.morph.surgery.indexing import Index, check_emptied, checked_index, emptied_axes, reindex_tensors
from morphtrain.morph.surgery.insert import Start, insert_block, insert_layers
from morphtrain.morph.surgery.rebind import Rebinder
from morphtrain.morph.surgery.removal import inherited_axis, replace_branch
from morphtrain.morph.surgery.widths import refresh_widths
from morphtrain.morph.trace.blocks import Block, find_blocks
from morphtrain.morph.trace.branches import Branch
from morphtrain.morph.trace.calls import Call, layer_calls
from morphtrain.morph.trace.division import divide
from morphtrain.morph.trace.points import Point, find_places
from morphtrain.morph.trace.propagator import trace_channels
from morphtrain.morph.trace.traced import Shared


class ChannelGraph:
    """The channel spaces of a model, kept up to date while they are changed.

    Attributes:
        model: the network; changes are made in place.
        axes: the dimensions of its tensors that hold channels.
        spaces: the channels that can change, each with all its slots.
        blocks: the branches that `remove_block` can remove.
        gathers: the modules that select or scatter channels by an index.
        shared: the tensors that several modules hold.
        kept: by the path of a layer that makes channels which cannot change: how many, and why; in the last trace.
        layer_places: the convolutions that `insert_layer` can put a layer in front of.
        block_places: the modules that `insert_block` can put a block after, by path.
        stage_ends: of these places, the last one in each stage.
        calls: every call of a layer, at the widths of the last trace.
    """

    axes: list[Axis]
    spaces: list[Space]
    blocks: list[Block]
    gathers: list[ChannelGather]
    shared: Shared
    kept: dict[str, str]
    layer_places: list[str]
    block_places: dict[str, Point]
    stage_ends: list[Point]
    calls: list[Call]

    def __init__(self, model: nn.Module, example_input: Any = None, ignore: Sequence[str] = ()) -> None:
        self.model = unwrapped(model)
        self.example_input = example_input
        self.ignore = tuple(ignore)
        self.axes, self.spaces, self.blocks, self.gathers = [], [], [], []
        self.layer_places, self.block_places, self.stage_ends = [], {}, []
        self.shared, self.calls, self.kept = {}, [], {}

    @classmethod
    def trace(cls, model: nn.Module, example_input: Any, ignore: Sequence[str] = ()) -> ChannelGraph:
        """Find the channel spaces of `model`, or of the network inside a `DataParallel` or a compiled one.

        Args:
            example_input: one batch that the model accepts, with the batch in dimension 0 (one sample is enough); for
                a model of several inputs, a tuple of them. Only shapes and types matter, and nothing is computed.
            ignore: `fnmatch` patterns of module paths ("head", "stages.*.attention") that are not looked into. These
                modules keep their shapes, and so do the channels that enter and leave them.

        Raises:
            MorphError: naming the operation, module path and source line of what cannot be followed.
        """
        graph = cls(model, example_input, ignore)
        graph._retrace()
        return graph

    @classmethod
    def untraced(cls, model: nn.Module) -> ChannelGraph:
        """A graph without spaces, for a `model` in which nothing is to be changed."""
        return cls(model)

    def retrace(self) -> dict[str, str]:
        """Find everything again, as `trace` finds it in the network that this one has become.

        `reindex` and `remove_block` keep the spaces, with their names and order, for those who hold them. A trace of
        the changed network may find them differently: what is numbered among its neighbours, or named after a layer
        that has gone, gets another name; neighbours that nothing keeps apart are one space; and what has a single
        channel may no longer be told from what it is mixed with. Spaces and blocks found earlier are no longer part of
        this graph.

        Returns:
            the new name of each space that is still there, by its name before.

        Raises:
            MorphError: as `trace`.
        """
        before = self.spaces
        if self.example_input is None:
            return {}
        self._retrace()
        return new_names(before, self.axes)

    def _retrace(self) -> None:
        trace = trace_channels(self.model, self.example_input, self.ignore)
        modules = dict(self.model.named_modules())
        self.layer_places, self.block_places, self.stage_ends = find_places(trace, modules)
        self.calls = layer_calls(trace.evaluation, modules, trace.activations)
        self.axes, self.spaces, self.gathers = divide(trace)
        self.shared, self.kept = trace.shared, trace.kept
        self.blocks = find_blocks(trace, modules, self.spaces)

    def __deepcopy__(self, memo: dict[int, Any]) -> ChannelGraph:
        """The graph of a copy of the model."""
        twin = copy.copy(self)
        memo |= stored_activations(self.model)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        # Modules that share tensors are known by their ids, which are different in the copy.
        twin.shared = {(id(memo[owner]), name): names for (owner, name), names in twin.shared.items()}
        return twin

    def __repr__(self) -> str:
        kept = [f"kept: {path}, {why}" for path, why in self.kept.items()]
        return "\n".join([f"ChannelGraph of {type(self.model).__name__}:", *map(repr, self.spaces), *kept])

    def space(self, name: str) -> Space:
        """The space of this name.

        Raises:
            KeyError: naming all spaces, if there is none of this name.
        """
        for space in self.spaces:
            if space.name == name:
                return space
        raise KeyError(f"no channel space '{name}'; there are {', '.join(s.name for s in self.spaces)}")

    def reindex(self, space: Space, index: Index, optimizer: Optimizer | None = None) -> None:
        """Make row j of `space` the old row `index[j]`, in every tensor that has a slot in it.

        Dropping entries prunes. Repeating entries widens and keeps the function: consumers are divided by the
        multiplicity (Net2Net, Chen et al. 2015, eq. 2.4), and so is their momentum. Optimizer state of a parameter's
        shape follows the index. Mode, `requires_grad`, dtype, device, memory format and parameter-group membership are
        kept. Gradients of the changed parameters are dropped, so call this between two steps.

        Args:
            index: (new size,), positions in the space.
            optimizer: the one that trains the model, if any.

        Raises:
            MorphError: before anything is changed, if an entry is out of range, an axis would be left empty, or a
                space that cannot be widened (`Space.is_ambiguous`) would be.
        """
        self.reindex_spaces({space: index}, optimizer)

    def reindex_spaces(self, changes: Mapping[Space, Index], optimizer: Optimizer | None = None) -> None:
        """`reindex` several spaces at once; a tensor between two of them is replaced once instead of twice."""
        indices = {space: self._checked(space, index) for space, index in changes.items()}
        check_emptied([space for space, index in indices.items() if len(index) == 0])
        axes = list(dict.fromkeys(slot.axis for space in indices for slot in space.slots))
        reindex_tensors(axes, indices, Rebinder(self.shared, optimizer))
        for space, index in indices.items():
            space.size = len(index)
            if space.size == 0:
                self._drop_space(space)
        self._refresh(axes)

    def can_remove(self, block: Block) -> bool:
        """Whether `remove_block` accepts `block`: it does not if a user of its channels would have none left."""
        gone = self._axes_in(block.branch)
        emptied = block.outputs if block.kind == "cat" else []
        return block in self.blocks and not any(any(emptied_axes(s, emptied, gone)) for s in emptied)

    def remove_block(self, block: Block, optimizer: Optimizer | None = None) -> None:
        """Remove a branch from the network.

        From a sum, the convolutions go, and what the branch's last norm gives for zeros stays. If the last of
        `block.spaces` had no live channel, the last convolution gave zeros, and the network computes the same as
        before in both modes. Sums with a downsampling shortcut keep that shortcut. From a concatenation, the channels
        of the branch go, and with them their consumers' weights.

        Raises:
            MorphError: before anything is changed, if `block` is not (or no longer) one of `self.blocks`, or if a user
                of its channels would have none left.
        """
        if block not in self.blocks:
            raise MorphError(f"'{block.path}' is not a removable block of this graph")
        branch = block.branch
        gone = self._axes_in(branch)
        if block.kind == "cat":
            check_emptied(block.outputs, without=gone)
        stand_in = replace_branch(self.model, branch, optimizer)
        self.blocks = [b for b in self.blocks if b is not block and not set(b.branch.layers) & set(branch.layers)]
        self._forget_places(branch.parts)
        self.kept = {path: why for path, why in self.kept.items() if not branch.holds(path)}
        if isinstance(stand_in, ZeroBranch):
            self.axes.append(inherited_axis(gone, branch, stand_in))
            gone = [axis for axis in gone if axis.module is not stand_in.norm]
        for axis in gone:
            self._drop_axis(axis)
        if block.kind == "cat":
            self.reindex_spaces({space: [] for space in block.outputs}, optimizer)
        self.spaces = [space for space in self.spaces if space.slots]

    def _forget_places(self, parts: Sequence[str]) -> None:
        """Nothing can be put where a module has gone."""

        def stays(path: str) -> bool:
            return not any(is_within(path, part) for part in parts)

        self.layer_places = [path for path in self.layer_places if stays(path)]
        self.block_places = {path: point for path, point in self.block_places.items() if stays(path)}
        self.stage_ends = [point for point in self.stage_ends if stays(point.path)]

    def gate(self, gates: Mapping[str, Gate], optimizer: Optimizer | None = None) -> None:
        """Make convolutions read and write only some of their neighbours' channels (channel gating, Lym et al. 2019).

        The convolution at each path loses the weights of the other channels. A layer that selects its inputs is put
        before it, and a layer that scatters its outputs among zeros after it. This is exact where the lost weights are
        zero. Spaces and blocks are found again; those found earlier are no longer part of this graph.

        Args:
            gates: by the path of the convolution.

        Raises:
            MorphError: before anything is changed, if a path is not that of an ungrouped convolution, if a
                convolution with a bias is to write fewer channels, if its weight is computed and cannot change so, or
                if it is tied to another layer (see `is_tied`).
        """
        rebinder = Rebinder(self.shared, optimizer)
        planned = planned_gates(dict(self.model.named_modules()), gates, rebinder)
        for path in filter(self.is_tied, gates):
            raise MorphError(f"'{path}' cannot be gated: it is used under another name, too, or its weight is")
        for path, gate in gates.items():
            insert_gate(self.model, path, gate, planned[path], rebinder)
        self._retrace()

    def is_tied(self, path: str) -> bool:
        """Whether the module at `path` is at another path, too, or another module holds its weight."""
        module = self.model.get_submodule(path)
        places = [other for _, other in self.model.named_modules(remove_duplicate=False) if other is module]
        parts = {id(part) for part in module.modules()}
        return len(places) > 1 or any(owner in parts and name != "bias" for owner, name in self.shared)

    def insert_layer(
        self,
        path: str | Sequence[str],
        calibration: Sequence[Any] = (),
        *,
        kernel: int = 3,
        optimizer: Optimizer | None = None,
    ) -> list[str]:
        """Put an identity convolution, with norm and ReLU, in front of the convolution at `path`.

        In evaluation mode the network computes the same as before; in training mode too, except for how much the
        statistics of a batch deviate from those of all `calibration` batches. If the network has no batch norm, the
        new layer has none. Spaces and blocks are found again; those found earlier are no longer part of this graph.

        Args:
            path: one of `layer_places`, or several.
            calibration: inputs of the model, on which the statistics for the new norms are measured.
            kernel: size of the new kernel, odd.
            optimizer: gets the new parameters, in the groups of the convolution's parameters.

        Returns:
            the paths of the new layers.

        Raises:
            MorphError: before anything is changed, for another path, an even kernel, or a missing calibration.
        """
        paths = [path] if isinstance(path, str) else list(path)
        for place in paths:
            if place not in self.layer_places:
                raise MorphError(f"no layer can be put in front of '{place}': {self._why_no_layer(place)}")
        paths.sort(key=self.layer_places.index)
        inserted = insert_layers(self.model, paths, calibration, kernel, Rebinder({}, optimizer))
        self._retrace()
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
        """Insert a residual block after the module at `path` without changing the network's function.

        A Sequential that ends with this module becomes longer; anywhere else a `Grown` replaces the module. Spaces and
        blocks are found again; those found earlier are no longer part of this graph.

        Args:
            path: a key of `block_places`; `stage_ends` are those at the ends of stages.
            calibration: inputs of the model, on which "half_half" measures its norms' statistics.
            kernels: sizes of the convolutions' kernels, odd.
            inner: channels between the convolutions; None: as many as the output has, or as "half_half" needs.
            start: "zero_gamma": the last norm's gamma is zero, so the branch adds nothing in either mode. "half_half":
                the branch is an identity, and branch and shortcut count half each; as exact as `insert_layer`. It has
                as many inner channels as the output, or twice as many if values after the module may be negative.
            optimizer: gets the new parameters.

        Returns:
            the path of the new block.

        Raises:
            MorphError: before anything is changed, for another path, an even kernel, or a missing calibration, and for
                "half_half" with another `inner`.
        """
        if path not in self.block_places:
            known = ", ".join(point.path for point in self.stage_ends) or "none"
            raise MorphError(f"no block can be put after '{path}'; the ends of stages are: {known}")
        self._retrace()  # widths may have changed since the last trace
        rebinder = Rebinder({}, optimizer)
        inserted = insert_block(self.model, self.block_places[path], calibration, kernels, inner, start, rebinder)
        self._retrace()
        return inserted

    def _why_no_layer(self, path: str) -> str:
        if not isinstance(dict(self.model.named_modules()).get(path), nn.Conv2d):
            known = ", ".join(self.layer_places) or "none"
            return f"it is not a two-dimensional convolution; there are: {known}"
        return "its input may be negative (an identity needs values after a ReLU), or it is used several times"

    def _refresh(self, axes: Sequence[Axis]) -> None:
        """Update what modules keep beside their tensors: widths, and the indices of gathers."""
        for axis in axes:
            if axis.counter:
                setattr(axis.module, axis.counter, axis.length)
        for axis in axes:
            refresh_widths(axis.module)
        changed = set(axes)
        for gather in self.gathers:
            if gather.source in changed or gather.gathered in changed:
                gather.refresh()

    def _checked(self, space: Space, index: Index) -> torch.Tensor:
        if space not in self.spaces:
            raise MorphError(f"'{space.name}' is not (or no longer) a channel space of this graph")
        return checked_index(space, index)

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
        self.gathers = [gather for gather in self.gathers if axis not in (gather.source, gather.gathered)]
