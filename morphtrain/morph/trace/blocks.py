"""Blocks: the branches of a network that can be removed, with the channel spaces that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from morphtrain.morph.spaces import Role, Space
from morphtrain.morph.trace.branches import Branch, Kind, find_branches
from morphtrain.morph.trace.traced import Shared, Trace


@dataclass(eq=False)
class Block:
    """A branch that can be removed.

    Args:
        branch: the layers that go.
        spaces: those that exist only inside the branch and that everything in it passes through, in the order of use.
            If any of them has no live channel, the branch adds constants. The last one feeds `branch.last`.
        outputs: the spaces of what the branch adds (`kind` "sum") or concatenates ("cat"; nothing else produces them).
    """

    branch: Branch
    spaces: list[Space]
    outputs: list[Space]

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
    by_layer: dict[str, list[Space]] = {}
    for space in spaces:
        for slot in space.slots:
            by_layer.setdefault(slot.axis.path, []).append(space)
    branches = list(find_branches(trace.nodes, modules))
    if trace.evaluation != trace.nodes:
        evaluation = list(find_branches(trace.evaluation, modules))
        branches = [branch for branch in branches if branch in evaluation]
    blocks = [_block(branch, by_layer) for branch in branches if not _shares(branch, modules, trace.shared)]
    return [block for block in blocks if _is_removable(block)]


def _block(branch: Branch, by_layer: Mapping[str, list[Space]]) -> Block:
    passed = dict.fromkeys(s for path in branch.chain for s in by_layer.get(path, ()) if _uses("consumes", path, s))
    inner = [s for s in passed if all(branch.holds(slot.axis.path) for slot in s.slots)]
    outputs = dict.fromkeys(s for s in by_layer.get(branch.last, ()) if _uses("produces", branch.last, s))
    return Block(branch, inner, list(outputs))


def _is_removable(block: Block) -> bool:
    if block.kind == "cat":
        makers = (slot.axis.path for s in block.outputs for slot in s.slots if slot.role == "produces")
        return bool(block.outputs) and all(map(block.branch.holds, makers))
    return bool(block.spaces) and _uses("consumes", block.branch.last, block.spaces[-1])


def _shares(branch: Branch, modules: Mapping[str, nn.Module], shared: Shared) -> bool:
    """Whether a tensor of the branch is held outside it too, so that it could not go with the branch."""
    inside = {id(m): m for part in branch.parts for m in modules[part].modules()}
    others = [m for (owner, _), names in shared.items() if owner in inside for m, _ in names]
    return any(id(m) not in inside for m in others)


def _uses(role: Role, path: str, space: Space) -> bool:
    return any(slot.role == role and slot.axis.path == path for slot in space.slots)
