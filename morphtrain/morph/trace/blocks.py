"""Blocks: the branches of a network that can be removed, with the channel spaces that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from morphtrain.morph.spaces import Axis, Role, Space
from morphtrain.morph.trace.branches import Branch, Kind, find_branches
from morphtrain.morph.trace.traced import Shared, Trace


@dataclass(eq=False)
class Block:
    """A branch that can be removed.

    Args:
        branch: the layers that go.
        inputs: path -> space, of each layer that everything in the branch passes through and whose input is one space
            that exists only inside the branch, in the order of use. If that space has no live channel, nothing that
            the branch adds depends on the branch's own input. `branch.last` comes last.
        outputs: the spaces of what the branch adds (`kind` "sum") or concatenates ("cat"; nothing else produces them).
    """

    branch: Branch
    inputs: dict[str, Space]
    outputs: list[Space]

    @property
    def spaces(self) -> list[Space]:
        """The spaces of `inputs`, in the order of use; the last one feeds `branch.last`."""
        return list(dict.fromkeys(self.inputs.values()))

    @property
    def path(self) -> str:
        """The path of the module that is the branch, or of its last layer: a name for the block."""
        return self.branch.path or self.branch.last

    @property
    def kind(self) -> Kind:
        """The operation that the branch is an operand of: "sum" or "cat"."""
        return self.branch.kind


def find_blocks(trace: Trace, modules: Mapping[str, nn.Module], spaces: list[Space]) -> list[Block]:
    """The branches that have spaces of their own and share no tensor with the rest of the network, in both modes."""
    axes: dict[str, list[Axis]] = {}
    for axis in dict.fromkeys(slot.axis for space in spaces for slot in space.slots):
        axes.setdefault(axis.path, []).append(axis)
    branches = list(find_branches(trace.nodes, modules))
    if trace.evaluation != trace.nodes:
        evaluation = list(find_branches(trace.evaluation, modules))
        branches = [branch for branch in branches if branch in evaluation]
    blocks = [_block(branch, axes) for branch in branches if not _shares(branch, modules, trace.shared)]
    return [block for block in blocks if _is_removable(block)]


def _block(branch: Branch, axes: Mapping[str, list[Axis]]) -> Block:
    read = {path: _spaces(axes, path, "consumes") for path in branch.chain}
    single = {path: spaces[0] for path, spaces in read.items() if len(spaces) == 1 and spaces[0] is not None}
    inner = {path: s for path, s in single.items() if all(branch.holds(slot.axis.path) for slot in s.slots)}
    return Block(branch, inner, [s for s in _spaces(axes, branch.last, "produces") if s is not None])


def _spaces(axes: Mapping[str, list[Axis]], path: str, role: Role) -> list[Space | None]:
    """The spaces along a layer's axis; None stands for entries that cannot change."""
    segments = [segment for axis in axes.get(path, ()) if axis.role == role for segment in axis.segments]
    return list(dict.fromkeys(segment.space for segment in segments))


def _is_removable(block: Block) -> bool:
    if block.kind == "cat":
        makers = (slot.axis.path for s in block.outputs for slot in s.slots if slot.role == "produces")
        return bool(block.outputs) and all(map(block.branch.holds, makers))
    return block.branch.last in block.inputs


def _shares(branch: Branch, modules: Mapping[str, nn.Module], shared: Shared) -> bool:
    """Whether a tensor of the branch is held outside it too, so that it could not go with the branch."""
    inside = {id(m): m for part in branch.parts for m in modules[part].modules()}
    others = [m for (owner, _), names in shared.items() if owner in inside for m, _ in names]
    return any(id(m) not in inside for m in others)
