"""Branches: everything that computes one operand of a sum or of a concatenation, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn

from morphtrain.morph.layers import ScatterChannels, ZeroBranch
from morphtrain.morph.paths import is_within
from morphtrain.morph.trace.kinds import ACTIVATIONS, CONVOLUTIONS, NORMS
from morphtrain.morph.trace.nodes import SUMS, modules_around, name_of
from morphtrain.morph.trace.writes import writes_outside

Kind = Literal["sum", "cat"]
CONCATENATIONS = ("cat", "concat", "concatenate")
# Functions that may be part of a branch: they accept an input without channels.
HARMLESS = frozenset(("mul", "imul", "cat", "dropout", "stochastic_depth")) | frozenset(
    ("relu", "relu_", "relu6", "leaky_relu", "silu", "gelu", "tanh", "sigmoid", "hardsigmoid", "hardswish")
)
# What may follow the last norm of a branch that is added to another.
TAIL = frozenset(("dropout", "stochastic_depth", "Dropout", "Dropout2d", "Identity", "Scale"))
# What may follow the last convolution of a branch that is concatenated; without the branch it has no input left.
PASSING = TAIL | HARMLESS | {kind.__name__ for kind in ACTIVATIONS}


@dataclass
class Branch:
    """What computes one operand of a sum or concatenation.

    Args:
        kind: of the operation.
        path: of the module that is the branch; "" if the branch is only a part of a module's forward.
        layers: the paths of all layers in it.
        chain: the paths of the layers that everything passes on its way to `last`, in order; `last` is the last one.
        last: the path of the convolution that makes the operand.
        norm: the path of the norm after `last`; "" if there is none.
        in_full: whether the operand must have the full shape of the sum, instead of being broadcast.
        stride: of the whole branch.
    """

    kind: Kind
    path: str
    layers: list[str]
    chain: list[str]
    last: str
    norm: str
    in_full: bool
    stride: tuple[int, ...]

    @property
    def parts(self) -> list[str]:
        """The modules that go: the one that is the branch, or each of its layers."""
        return [self.path] if self.path else self.layers

    @property
    def place(self) -> str:
        """The path of the module that a stand-in replaces when the branch goes."""
        return self.path or (self.norm if self.kind == "sum" else "") or self.last

    def holds(self, path: str) -> bool:
        """Whether the module at `path` is part of it."""
        return any(is_within(path, part) for part in self.parts)


def find_branches(nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module]) -> Iterator[Branch]:
    """Every branch whose last layer is a convolution, with or without a norm after it."""
    finder = _Finder(nodes, modules)
    for n in nodes:
        for kind, operand in _operands(n):
            branch = finder.branch(kind, n, operand)
            if branch is not None:
                yield branch


def _operands(n: fx.Node) -> Iterator[tuple[Kind, fx.Node]]:
    if n.op not in ("call_function", "call_method"):
        return
    name = name_of(n)
    if name in SUMS and len(n.all_input_nodes) == 2 and "shape" in n.meta:
        for operand in n.all_input_nodes:
            if set(operand.users) == {n}:
                yield "sum", operand
    elif name in CONCATENATIONS:
        for operand in n.all_input_nodes:
            users = list(operand.users)
            if users[0] is n and all(name_of(u) in CONCATENATIONS for u in users):
                yield "cat", operand


class _Finder:
    """Tells for one operand at a time whether a branch computes it."""

    def __init__(self, nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.calls = Counter(str(n.target) for n in nodes if n.op == "call_module")
        made = [n for n in nodes if n.op in ("call_module", "call_function", "call_method")]
        self.inside = Counter(path for n in made for path in modules_around(n))  # module path -> calls in it

    def branch(self, kind: Kind, n: fx.Node, operand: fx.Node) -> Branch | None:
        """The branch that computes an operand of `n`; None if something else does."""
        last, norm, tail = self._last_layers(operand, TAIL if kind == "sum" else PASSING)
        if last is None:
            return None
        members = _exclusive(operand)
        stride = _stride(members, operand)
        tail = tail if kind == "sum" else []  # after a concatenation the tail has no input left: it goes too
        called = [m for m in members if m.op == "call_module" and m not in tail]
        layers = [str(m.target) for m in called if self.calls[str(m.target)] == 1]
        # A layer that is called elsewhere too, as activations often are, stays: it has no parameters.
        stays = [str(m.target) for m in called if self.calls[str(m.target)] > 1]
        if norm and self._mixes_constants(norm, last):
            return None
        path = "" if tail else self._module_of(members)
        if stride is None or not (path or self._is_harmless(members, stays)) or writes_outside(members, self.modules):
            return None
        return Branch(
            kind=kind,
            path=path,
            layers=list(dict.fromkeys(layers + stays)) if path else layers,
            chain=_chain(members, last),
            last=str(last.target),
            norm=norm,
            in_full=bool(tail) or (kind == "sum" and self._needs_full_shape(n, operand)),
            stride=stride,
        )

    def _mixes_constants(self, norm: str, last: fx.Node) -> bool:
        """Whether a norm over several channels follows a bias, so that it does not give for zeros what it gave."""
        convolution: Any = self.modules[str(last.target)]
        return isinstance(self.modules[norm], nn.GroupNorm) and convolution.bias is not None

    def _module_of(self, members: Mapping[fx.Node, None]) -> str:
        """The path of the module whose forward is exactly these calls; "" if there is none."""
        calls = [m for m in members if m.op != "get_attr"]
        around = [modules_around(m) for m in calls]
        common = [path for path in around[0] if all(path in paths for paths in around)]
        return common[-1] if common and self.inside[common[-1]] == len(calls) else ""

    def _is_harmless(self, members: Mapping[fx.Node, None], stays: Sequence[str]) -> bool:
        """Whether what is left of a branch can be called without channels."""
        return all(isinstance(self.modules[path], ACTIVATIONS) for path in stays) and all(
            m.op == "call_module" or (m.op != "get_attr" and name_of(m) in HARMLESS and "shape" in m.meta)
            for m in members
        )

    def _needs_full_shape(self, n: fx.Node, operand: fx.Node) -> bool:
        """Whether a sum may need its shape from `operand`, even after the branch is gone.

        It does if it writes into `operand`, or if the other operand is what is left of a branch. If both operands are
        branches, the second keeps the shape.
        """
        if name_of(n) in ("iadd", "add_") and n.args[0] is operand:
            return True
        (other,) = (a for a in n.all_input_nodes if a is not operand)
        left = self.modules.get(str(other.target)) if other.op == "call_module" else None
        if isinstance(left, ZeroBranch):
            return left.stride is None
        second = n.all_input_nodes[1] is operand
        return second and self._last_layers(other, TAIL)[0] is not None

    def _last_layers(self, operand: fx.Node, passing: frozenset[str]) -> tuple[fx.Node | None, str, list[fx.Node]]:
        """The convolution that makes `operand`, the path of the norm after it, and the calls after both."""
        node, norm, scatters = operand, "", False
        tail: list[fx.Node] = []
        while not self._makes_channels(node):
            if not norm and self._is(node, NORMS):
                norm = str(node.target)
            elif isinstance(self.modules.get(str(node.target)), ScatterChannels):
                scatters = True
            elif self._kind_name(node) in passing:
                tail += [] if norm else [node]
            else:
                return None, "", []
            if len(node.all_input_nodes) != 1 or len(node.all_input_nodes[0].users) != 1:
                return None, "", []
            node = node.all_input_nodes[0]
        return (None, "", []) if scatters and not norm else (node, norm, tail)

    def _makes_channels(self, n: fx.Node) -> bool:
        """Whether a call is of a convolution whose outputs are new channels; a depthwise one keeps its inputs'."""
        if not self._is(n, CONVOLUTIONS):
            return False
        convolution: Any = self.modules[str(n.target)]
        return bool(convolution.groups == 1 or convolution.groups < convolution.in_channels)

    def _is(self, n: fx.Node, kinds: tuple[type, ...]) -> bool:
        return n.op == "call_module" and isinstance(self.modules[str(n.target)], kinds)

    def _kind_name(self, n: fx.Node) -> str:
        return type(self.modules[str(n.target)]).__name__ if n.op == "call_module" else name_of(n)


def _exclusive(operand: fx.Node) -> dict[fx.Node, None]:
    """An ordered set of the nodes that have no effect except through `operand`, which comes first."""
    found: dict[fx.Node, None] = {operand: None}
    waiting = [operand]
    while waiting:
        for a in waiting.pop().all_input_nodes:
            if a not in found and a.op != "placeholder" and all(user in found for user in a.users):
                found[a] = None
                waiting.append(a)
    return found


def _chain(members: Mapping[fx.Node, None], last: fx.Node) -> list[str]:
    """The layers that every path from the inputs of a branch to `last` passes, in the order of the graph."""
    starts = [m for m in members if any(a not in members and a.op != "get_attr" for a in m.all_input_nodes)]

    def reached_without(layer: fx.Node) -> bool:
        found, waiting = {layer}, [m for m in starts if m is not layer]
        while waiting:
            node = waiting.pop()
            if node is last:
                return True
            found.add(node)
            waiting += [user for user in node.users if user in members and user not in found]
        return False

    layers = [n for n in last.graph.nodes if n in members and n.op == "call_module"]
    return [str(m.target) for m in layers if m is last or not reached_without(m)]


def _stride(members: Mapping[fx.Node, None], operand: fx.Node) -> tuple[int, ...] | None:
    """By what a branch divides each spatial dimension; None if its inputs differ or do not divide evenly."""
    entries = [a for m in members for a in m.all_input_nodes if a not in members and a.op != "get_attr"]
    strides = {_stride_from(a, operand) for a in entries if "shape" in a.meta}
    return strides.pop() if len(strides) == 1 else None


def _stride_from(entry: fx.Node, operand: fx.Node) -> tuple[int, ...] | None:
    before, after = entry.meta["shape"][2:], operand.meta["shape"][2:]
    if len(before) != 2 or len(after) != 2 or not all(after):
        return None  # the layers that would stand in for the branch are two-dimensional
    stride = tuple(max(1, -(-b // a)) for b, a in zip(before, after, strict=True))
    fits = all(-(-b // s) == a for b, a, s in zip(before, after, stride, strict=True))
    return stride if fits else None
