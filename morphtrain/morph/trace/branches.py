"""Parts of a network that can go as a whole: what computes one operand of a sum, or of a concatenation, and no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn

from morphtrain.morph.layers import ScatterChannels, ZeroBranch
from morphtrain.morph.paths import common_path, is_within, prefixes
from morphtrain.morph.spaces import Space
from morphtrain.morph.surgery.rebind import Shared
from morphtrain.morph.trace.nodes import name_of, owner_path
from morphtrain.morph.trace.propagator import Role, Trace
from morphtrain.morph.trace.rules.layers import ACTIVATIONS, NORMS

Kind = Literal["sum", "cat"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONCATENATIONS = ("cat", "concat", "concatenate")
# What may stand in a branch beside layers: it does not mind being given no channels.
HARMLESS = frozenset(("mul", "cat", "dropout", "stochastic_depth")) | frozenset(
    ("relu", "relu_", "relu6", "leaky_relu", "silu", "gelu", "tanh", "sigmoid", "hardsigmoid", "hardswish")
)
# These may stand behind the last norm of a branch that is added to another ...
TAIL = frozenset(("dropout", "stochastic_depth", "Dropout", "Dropout2d", "Identity", "Scale"))
# ... and these behind the convolution of one that is concatenated, and so has nothing left to pass on.
PASSING = TAIL | HARMLESS | {kind.__name__ for kind in ACTIVATIONS}


@dataclass
class Branch:
    """What computes one operand of a sum or concatenation.

    Args:
        kind: of the operation.
        path: the module that is the branch; "" if the branch is part of a module's forward.
        layers: the paths of all layers in it.
        chain: the paths of those that everything passes on its way to `last`, which is the last of them.
        last, norm: paths of the convolution that makes the operand, and of the norm behind it ("" if there is none).
        in_full: whether the operand has to have the sum's full shape.
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

    def holds(self, path: str) -> bool:
        """Whether the module at `path` is part of it."""
        return any(is_within(path, part) for part in self.parts)


@dataclass(eq=False)
class Block:
    """A branch that can be removed.

    `spaces` live only inside it, and everything in it passes through each: without one of them the branch adds
    constants. They are in the order of use; the last one feeds the convolution `branch.last`. `outputs` are the spaces
    of what it adds (`kind` "sum") or concatenates ("cat"; they have no other producer then).
    """

    branch: Branch
    spaces: list[Space]
    outputs: list[Space]

    @property
    def path(self) -> str:
        """A name for it: its module, or its last layer."""
        return self.branch.path or self.branch.last

    @property
    def kind(self) -> Kind:
        return self.branch.kind


def find_blocks(trace: Trace, modules: Mapping[str, nn.Module], spaces: list[Space]) -> list[Block]:
    """The branches whose spaces live only inside them, and which nothing else shares tensors with."""
    blocks = []
    by_layer: dict[str, list[Space]] = {}
    for space in spaces:
        for slot in space.slots:
            by_layer.setdefault(slot.axis.path, []).append(space)
    for branch in find_branches(trace.nodes, modules):
        passed = dict.fromkeys(s for path in branch.chain for s in by_layer.get(path, ()) if _uses("consumes", path, s))
        inner = [s for s in passed if all(branch.holds(slot.axis.path) for slot in s.slots)]
        outputs = list(dict.fromkeys(s for s in by_layer.get(branch.last, ()) if _uses("produces", branch.last, s)))
        if branch.kind == "cat":
            makers = (slot.axis.path for s in outputs for slot in s.slots if slot.role == "produces")
            removable = bool(outputs) and all(map(branch.holds, makers))
        else:
            removable = bool(inner) and _uses("consumes", branch.last, inner[-1])
        if removable and not _shares(branch, modules, trace.shared):
            blocks.append(Block(branch, inner, outputs))
    return blocks


def find_branches(nodes: list[fx.Node], modules: Mapping[str, nn.Module]) -> Iterator[Branch]:
    """Every branch of the graph whose last layer is a convolution, perhaps with a norm behind it."""
    calls: dict[str, int] = {}
    inside: dict[str, int] = {}  # module path -> nodes in it
    for n in nodes:
        if n.op == "call_module":
            calls[str(n.target)] = calls.get(str(n.target), 0) + 1
        if n.op in ("call_module", "call_function", "call_method"):
            for path in prefixes(owner_path(n)):
                inside[path] = inside.get(path, 0) + 1
    for n in nodes:
        for kind, operand in _operands(n):
            branch = _branch(kind, n, operand, modules, calls, inside)
            if branch is not None:
                yield branch


def _operands(n: fx.Node) -> Iterator[tuple[Kind, fx.Node]]:
    if n.op not in ("call_function", "call_method"):
        return
    name = name_of(n)
    if name in ("add", "iadd", "add_") and len(n.all_input_nodes) == 2 and "shape" in n.meta:
        for operand in n.all_input_nodes:
            if set(operand.users) == {n}:
                yield "sum", operand
    elif name in CONCATENATIONS:
        for operand in n.all_input_nodes:
            users = list(operand.users)
            if users[0] is n and all(name_of(u) in CONCATENATIONS for u in users):
                yield "cat", operand


def _branch(
    kind: Kind,
    n: fx.Node,
    operand: fx.Node,
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, int],
    inside: Mapping[str, int],
) -> Branch | None:
    node, norm, tail = _last_layers(operand, modules, TAIL if kind == "sum" else PASSING)
    if node is None:
        return None
    members = _exclusive(operand)
    tail = tail if kind == "sum" else []  # of nothing, nothing is passed on
    entries = [a for m in members for a in m.all_input_nodes if a not in members and a.op != "get_attr"]
    strides = {_stride(a, operand) for a in entries if "shape" in a.meta}
    if len(strides) != 1:
        return None
    # A layer that stands elsewhere too, as activations often do, goes on where it is: it has no parameters.
    called = [m for m in members if m.op == "call_module" and m not in tail]
    layers = [str(m.target) for m in called if calls[str(m.target)] == 1]
    stays = [str(m.target) for m in called if calls[str(m.target)] > 1]
    path = common_path([owner_path(m) for m in members if m.op != "get_attr"])
    is_module = bool(path) and not tail and inside.get(path) == sum(1 for m in members if m.op != "get_attr")
    harmless = all(isinstance(modules[path], ACTIVATIONS) for path in stays) and all(
        m.op == "call_module" or (m.op != "get_attr" and name_of(m) in HARMLESS and "shape" in m.meta) for m in members
    )
    (stride,) = strides
    if stride is None or not (is_module or harmless):
        return None
    in_place = name_of(n) in ("iadd", "add_") and n.args[0] is operand
    return Branch(
        kind=kind,
        path=path if is_module else "",
        layers=list(dict.fromkeys(layers + stays)) if is_module else layers,
        chain=_chain(members, node),
        last=str(node.target),
        norm=norm,
        in_full=bool(tail) or in_place or (kind == "sum" and _other_may_be_small(n, operand, modules)),
        stride=stride,
    )


def _other_may_be_small(n: fx.Node, operand: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the sum's shape may have to come from `operand`, even when that is gone.

    The other operand is what was left of a branch, or will be: of two branches the second keeps the shape.
    """
    (other,) = (a for a in n.all_input_nodes if a is not operand)
    left = modules.get(str(other.target)) if other.op == "call_module" else None
    if isinstance(left, ZeroBranch):
        return left.stride is None
    second = n.all_input_nodes[1] is operand
    return second and _last_layers(other, modules, TAIL)[0] is not None


def _last_layers(
    operand: fx.Node, modules: Mapping[str, nn.Module], passing: frozenset[str]
) -> tuple[fx.Node | None, str, list[fx.Node]]:
    """The convolution that makes `operand`, the path of the norm behind it, and what is behind both."""
    node, norm, scatters = operand, "", False
    tail: list[fx.Node] = []
    while not (_is(node, modules, CONVOLUTIONS) and _mixes(modules[str(node.target)])):
        if not norm and _is(node, modules, NORMS):
            norm = str(node.target)
        elif isinstance(modules.get(str(node.target)), ScatterChannels):
            scatters = True
        elif _kind_name(node, modules) in passing:
            tail += [] if norm else [node]
        else:
            return None, "", []
        if len(node.all_input_nodes) != 1 or len(node.all_input_nodes[0].users) != 1:
            return None, "", []
        node = node.all_input_nodes[0]
    return (None, "", []) if scatters and not norm else (node, norm, tail)


def _is(n: fx.Node, modules: Mapping[str, nn.Module], kinds: tuple[type, ...]) -> bool:
    return n.op == "call_module" and isinstance(modules[str(n.target)], kinds)


def _mixes(convolution: Any) -> bool:
    """Whether its outputs are channels of their own: those of a depthwise convolution are its inputs'."""
    return bool(convolution.groups == 1 or convolution.groups < convolution.in_channels)


def _kind_name(n: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    return type(modules[str(n.target)]).__name__ if n.op == "call_module" else name_of(n)


def _exclusive(operand: fx.Node) -> dict[fx.Node, None]:
    """The nodes that have no effect but through `operand`, it included and first: a set, in order."""
    found: dict[fx.Node, None] = {operand: None}
    waiting = [operand]
    while waiting:
        for a in waiting.pop().all_input_nodes:
            if a not in found and a.op != "placeholder" and all(user in found for user in a.users):
                found[a] = None
                waiting.append(a)
    return found


def _chain(members: Mapping[fx.Node, None], last: fx.Node) -> list[str]:
    """The layers without which nothing that enters reaches `last`, in the order of the graph."""
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


def _stride(entry: fx.Node, operand: fx.Node) -> tuple[int, ...] | None:
    """By how much a branch shrinks each spatial dimension; None if it does not do so evenly."""
    before, behind = entry.meta["shape"][2:], operand.meta["shape"][2:]
    if len(before) != 2 or len(behind) != 2 or not all(behind):
        return None  # our own layers in its place are two-dimensional
    stride = tuple(max(1, -(-b // a)) for b, a in zip(before, behind, strict=True))
    fits = all(-(-b // s) == a for b, a, s in zip(before, behind, stride, strict=True))
    return stride if fits else None


def _shares(branch: Branch, modules: Mapping[str, nn.Module], shared: Shared) -> bool:
    """Whether a module of the branch holds a tensor that others hold too, which then could not go with it."""
    inside = {id(m): m for part in branch.parts for m in modules[part].modules()}
    others = [m for (owner, _), names in shared.items() if owner in inside for m, _ in names]
    return any(id(m) not in inside for m in others)


def _uses(role: Role, path: str, space: Space) -> bool:
    return any(slot.role == role and slot.axis.path == path for slot in space.slots)
