"""How each function and tensor method moves channels, by its name: torch's functions, operators and methods share them.

Where a size that holds channels is a constant in the model's code, these channels are kept. Where the code computes
it (from a shape, or as -1), it follows a change; then the constants beside it say what has to change together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from morphtrain.morph import layer_rules
from morphtrain.morph.labels import along, compact, fixed, full, varies
from morphtrain.morph.nodes import describe, name_of, tensors_in

if TYPE_CHECKING:
    from morphtrain.morph.trace import Propagator

Rule = Callable[["Propagator", fx.Node, Any], Any]


def follow(p: Propagator, n: fx.Node, value: Any) -> Any:
    """The labels of a function's or method's result; refused if there is no rule for it."""
    home = "torch" if n.op == "call_method" else str(getattr(n.target, "__module__", None) or "torch")
    rule = RULES.get(name_of(n)) if home.startswith(("torch", "_operator")) else None
    if rule is None:
        p.refuse(n, describe(n))
    takes_widths = name_of(n) in TAKES_WIDTHS
    if not takes_widths and any(a in p.widths for a in n.all_input_nodes):
        p.refuse(n, f"{describe(n)}, which computes with a number of channels")
    return rule(p, n, value)


def number(p: Propagator, n: fx.Node, value: Any) -> None:
    """Note whether a value that is no tensor depends on a number of channels."""
    if any(a in p.widths for a in n.all_input_nodes):
        p.widths.add(n)
    if isinstance(value, torch.Size) or name_of(n) == "numel":
        n.meta["size of"] = n.args[0]
        if name_of(n) == "numel":
            p.widths.add(n)
    sized = n.args[0] if n.args else None
    if name_of(n) == "size" and isinstance(value, int):
        dims = [argument(n, 1, "dim")]
    elif name_of(n) == "getitem" and isinstance(sized, fx.Node) and "size of" in sized.meta:
        sized, dims = sized.meta["size of"], [n.args[1]]
    else:
        return
    if not isinstance(sized, fx.Node) or not isinstance(p.labels.get(sized), torch.Tensor):
        return
    labels, shape = p.labels[sized], p.shape(sized)
    for dim in dims:
        one_channel = isinstance(dim, int) and shape[dim] == 1 and bool(labels.any())
        if not isinstance(dim, int) or varies(labels, dim) or one_channel:
            p.widths.add(n)


# -- what the rules are made of ----------------------------------------------------------------------------------


def argument(n: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by position or by name."""
    return n.args[position] if len(n.args) > position else n.kwargs.get(name, default)


def first(n: fx.Node, name: str = "input") -> fx.Node:
    node: fx.Node = argument(n, 0, name)
    return node


def concrete(p: Propagator, value: Any) -> Any:
    """An argument with the values of the nodes in it."""
    return fx.node.map_arg(value, lambda a: p.env[a])


def kept(p: Propagator, x: fx.Node) -> torch.Tensor:
    """The labels of `x`, whose channels cannot change from here on."""
    p.keep_all(p.labels[x])
    labels: torch.Tensor = p.labels[x]
    return labels


def keep_varying(p: Propagator, x: fx.Node, dims: Iterable[int]) -> bool:
    """Keep the channels of `x` if they lie in one of `dims`; whether they do."""
    labels = p.labels[x]
    if any(varies(labels, dim) for dim in dims):
        p.keep_all(labels)
        return True
    return False


def unchanged(p: Propagator, n: fx.Node, x: fx.Node, value: Any) -> torch.Tensor:
    """Labels behind an operation that treats every channel by itself and moves none."""
    labels: torch.Tensor = p.labels[x]
    fits = isinstance(value, torch.Tensor) and value.dim() == labels.dim()
    if not fits or any(varies(labels, d) and value.shape[d] != labels.shape[d] for d in range(labels.dim())):
        p.refuse(n, f"{describe(n)}, which changes the dimension of the channels")
    return labels


def reshaped(p: Propagator, x: fx.Node, value: torch.Tensor, sizes: Sequence[Any]) -> torch.Tensor:
    """Labels behind a view or reshape to `sizes`: numbers, or nodes that compute them."""
    shape = p.shape(x)
    labels = full(p.labels[x], shape).reshape(value.shape)
    for into, out in matching_dims(shape, value.shape):
        if not any(varies(p.labels[x], d) for d in into):
            continue
        follows = [d for d in out if sizes[d] == -1 or (isinstance(sizes[d], fx.Node) and sizes[d] in p.widths)]
        if not follows:
            p.joins.keep(compact(labels))
        for d in out:
            if d not in follows:
                p.joins.tie(labels, d)
    return compact(labels)


def matching_dims(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of dimensions that a reshape turns into each other."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        into: list[int] = []
        out: list[int] = []
        a = b = 1
        while not into or not out or a != b:
            if i < len(before) and (a <= b or j == len(after)):
                a *= before[i]
                into.append(i)
                i += 1
            elif j < len(after):
                b *= after[j]
                out.append(j)
                j += 1
            else:
                break
        groups.append((into, out))
    return groups


def flattened(p: Propagator, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Labels behind a flatten: a merged dimension follows whatever changes in it."""
    return reshaped(p, x, value, [-1] * value.dim())


def pixel_shuffled(p: Propagator, n: fx.Node, x: fx.Node, value: torch.Tensor, factor: int, up: bool) -> torch.Tensor:
    """Labels behind (C*r*r, H, W) -> (C, H*r, W*r) and back: r*r neighbouring channels are one."""
    line = p.line(n, x, -3)
    if up:
        groups = line.view(-1, factor * factor)
        p.joins.tie(groups, 1)
        return along(groups[:, 0], -3, value.dim())
    return along(line.repeat_interleave(factor * factor), -3, value.dim())


def channel_shuffled(p: Propagator, n: fx.Node, x: fx.Node, groups: int) -> torch.Tensor:
    """Labels behind a channel shuffle: the groups stay equally wide."""
    line = p.line(n, x, 1).view(groups, -1)
    p.joins.tie(line, 0)
    return along(line.t().flatten(), 1, len(p.shape(x)))


# -- the rules ---------------------------------------------------------------------------------------------------


def _unchanged(p: Propagator, n: fx.Node, value: Any) -> Any:
    if sum(a in p.labels for a in n.all_input_nodes) > 1:
        p.refuse(n, f"{describe(n)} of several tensors")
    return unchanged(p, n, first(n), value)


def _elementwise(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """A sum, product, ...: what stands at the same place is joined; one number for all channels is kept."""
    rank = value.dim()
    operands = [a for a in n.all_input_nodes if isinstance(p.labels.get(a), torch.Tensor)]
    labels = [p.labels[a].view([1] * (rank - p.labels[a].dim()) + list(p.labels[a].shape)) for a in operands]
    sizes = [[1] * (rank - len(p.shape(a))) + list(p.shape(a)) for a in operands]
    wide = [d for d in range(rank) if any(varies(label, d) for label in labels)]
    whole = []
    for label, size in zip(labels, sizes, strict=True):
        if any(size[d] == 1 and value.shape[d] != 1 for d in wide):
            p.joins.keep(label)  # broadcast over the channels
        elif wide or bool(label.any()) or list(size) == list(value.shape):
            whole.append(label)
    if not whole:
        return fixed(rank)
    for label in whole[1:]:
        p.joins.join(whole[0], label)
    return max(whole, key=torch.Tensor.numel)


def _reduced(p: Propagator, n: fx.Node, value: Any) -> Any:
    """A mean, sum, maximum, ... over some dimensions; over the channels it mixes them, so they stay."""
    x = first(n)
    rank = len(p.shape(x))
    dims = argument(n, 1, "dim")
    dims = list(range(rank)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    dims = [d % rank for d in dims]
    mixes = keep_varying(p, x, dims)
    results = []
    for tensor in tensors_in(value):
        if mixes:
            results.append(fixed(tensor.dim()))
        elif tensor.dim() == rank:
            results.append(p.labels[x])
        else:
            labels = p.labels[x]
            results.append(labels.view([labels.shape[d] for d in range(rank) if d not in dims]))
    return results[0] if isinstance(value, torch.Tensor) else tuple(results)


def _mixing(p: Propagator, n: fx.Node, value: Any) -> Any:
    """softmax and the like along a dimension: channels in it stay."""
    dim = argument(n, 1, "dim")
    keep_varying(p, first(n), range(value.dim()) if dim is None else [dim])
    return p.labels[first(n)]


def _glu(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """One half of a dimension gates the other."""
    dim = argument(n, 1, "dim", -1)
    labels: torch.Tensor = p.labels[first(n)]
    if not varies(labels, dim):
        return labels
    halves = labels.unflatten(dim, (2, -1))
    p.joins.tie(halves, dim % labels.dim())
    return labels.narrow(dim, 0, value.shape[dim])


def _normalised(p: Propagator, n: fx.Node, value: Any) -> Any:
    dims = argument(n, 2, "dim", 1)
    keep_varying(p, first(n), [dims] if isinstance(dims, int) else dims)
    return p.labels[first(n)]


def _moved(p: Propagator, n: fx.Node, value: Any) -> Any:
    """permute, transpose, unsqueeze, ...: the same operation moves the labels."""
    x = first(n)
    labels = full(p.labels[x], p.shape(x))
    rest = concrete(p, n.args[1:])
    if n.op == "call_method":
        moved = getattr(labels, str(n.target))(*rest, **concrete(p, n.kwargs))
    else:
        moved = n.target(labels, *rest, **{k: concrete(p, v) for k, v in n.kwargs.items() if k != "input"})  # type: ignore[operator]
    return compact(moved)


def _reshape(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    sizes = list(n.args[1:]) or list(n.kwargs.values())[:1]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    if len(sizes) != value.dim() or any(isinstance(concrete(p, size), torch.Size) for size in sizes):
        p.refuse(n, f"{describe(n)} to the shape of another tensor")
    return reshaped(p, first(n), value, sizes)


def _flatten(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return flattened(p, first(n), value)


def _unflatten(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    x = first(n)
    dim = argument(n, 1, "dim") % len(p.shape(x))
    sizes: list[Any] = list(p.shape(x))
    sizes[dim : dim + 1] = list(argument(n, 2, "sizes"))
    return reshaped(p, x, value, sizes)


def _expanded(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    x = first(n)
    labels: torch.Tensor = p.labels[x]
    rank = value.dim()
    labels = labels.view([1] * (rank - labels.dim()) + list(labels.shape))
    shape = [1] * (rank - len(p.shape(x))) + list(p.shape(x))
    if labels.numel() == 1 and any(size == 1 != wide for size, wide in zip(shape[1:], value.shape[1:], strict=True)):
        p.joins.keep(labels)  # one channel that becomes several
    return labels


def _rolled(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    dims = argument(n, 2, "dims")
    if keep_varying(p, first(n), range(value.dim()) if dims is None else [dims] if isinstance(dims, int) else dims):
        return fixed(value.dim())
    return p.labels[first(n)]


def _concatenated(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    parts = list(argument(n, 0, "tensors"))
    return joined_along(p, parts, argument(n, 1, "dim", 0) % value.dim(), value)


def joined_along(p: Propagator, parts: Sequence[fx.Node], dim: int, value: torch.Tensor) -> torch.Tensor:
    """Labels of a concatenation: side by side if the channels are in `dim`, else joined."""
    labels = [p.labels[part] for part in parts]
    elsewhere = any(varies(label, d) for label in labels for d in range(value.dim()) if d != dim)
    if elsewhere and not any(varies(label, dim) for label in labels):
        for label in labels[1:]:
            p.joins.join(labels[0], label)
        return max(labels, key=torch.Tensor.numel)
    shape = [max(label.shape[d] for label in labels) for d in range(value.dim())]
    wide = []
    for part, label in zip(parts, labels, strict=True):
        shape[dim] = p.shape(part)[dim]
        wide.append(label.expand(shape))
    return compact(torch.cat(wide, dim))


def _stacked(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Activations of one shape in a new dimension: channel by channel they are one."""
    parts = list(argument(n, 0, "tensors"))
    labels = [p.labels[part].unsqueeze(argument(n, 1, "dim", 0)) for part in parts]
    for label in labels[1:]:
        p.joins.join(labels[0], label)
    return max(labels, key=torch.Tensor.numel)


def _divided(p: Propagator, n: fx.Node, value: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """chunk, split: pieces of one size stay of one size; a size that is a constant in the code is kept."""
    x = first(n, "tensor" if name_of(n) == "split" else "input")
    dim = argument(n, 2, "dim", 0) % len(p.shape(x))
    labels: torch.Tensor = p.labels[x]
    if not varies(labels, dim):
        if p.shape(x)[dim] == 1:
            p.joins.keep(labels)
        return tuple(labels for _ in value)
    sizes = [piece.shape[dim] for piece in value]
    wanted = argument(n, 1, "split_size_or_sections")
    wanted = list(wanted) if isinstance(wanted, (tuple, list)) else [wanted]
    follows = name_of(n) in ("chunk", "tensor_split") or all(isinstance(w, fx.Node) and w in p.widths for w in wanted)
    if len(set(sizes)) == 1 and follows:
        p.joins.tie(labels.unflatten(dim, (len(sizes), sizes[0])), dim)
    else:
        p.joins.keep(labels)
    return tuple(compact(piece) for piece in labels.split(sizes, dim))


def _unbound(p: Propagator, n: fx.Node, value: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    x = first(n)
    dim = argument(n, 1, "dim", 0) % len(p.shape(x))
    keep_varying(p, x, [dim])
    return tuple(compact(piece) for piece in full(p.labels[x], p.shape(x)).unbind(dim))


def _indexed(p: Propagator, n: fx.Node, value: Any) -> Any:
    """x[...]: an element of a tuple, or slices and positions; channels in front of a constant bound stay."""
    x, index = n.args[0], n.args[1]
    assert isinstance(x, fx.Node)
    labels = p.labels[x]
    if not isinstance(labels, torch.Tensor):
        if isinstance(index, fx.Node):
            p.refuse(n, "an index that is computed")
        return labels[index]
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(e, (fx.Node, list, torch.Tensor)) for e in entries):
        p.refuse(n, "an index that is computed, or a list")
    shape = p.shape(x)
    consumed = sum(1 for e in entries if e is not None and e is not Ellipsis)
    dim = 0
    for entry in entries:
        if entry is Ellipsis:
            dim += len(shape) - consumed
        elif entry is not None:
            if dim < len(shape) and entry != slice(None):
                _keep_to_bound(p, labels, dim, entry)
            dim += 1
    return compact(full(labels, shape)[concrete(p, index)])


def _keep_to_bound(p: Propagator, labels: torch.Tensor, dim: int, entry: Any) -> None:
    """An index is right after a change if as many channels as before lie in front of its bounds."""
    size = labels.shape[dim]
    if size == 1:
        return
    bounds = [entry] if not isinstance(entry, slice) else [entry.start, entry.stop]
    computed = [b for b in bounds if isinstance(b, fx.Node)]
    if isinstance(entry, slice) and entry.step not in (None, 1):
        p.joins.keep(labels)
    elif computed:
        halves = isinstance(entry, slice) and all(
            b is None or (isinstance(b, fx.Node) and b in p.widths and 2 * p.env[b] == size) for b in bounds
        )
        if halves:
            p.joins.tie(labels.unflatten(dim, (2, size // 2)), dim)
        else:
            p.joins.keep(labels)
    else:
        for bound in bounds:
            if bound is not None and bound >= 0:
                p.joins.keep(labels.narrow(dim, 0, min(bound + (not isinstance(entry, slice)), size)))
            elif bound is not None:
                p.joins.keep(labels.narrow(dim, max(size + bound, 0), min(-bound, size)))


def _narrowed(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    x = first(n)
    keep_varying(p, x, [argument(n, 1, "dim")])
    return _moved(p, n, value)


def _padded(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Zeros beside the channels are as many as the code says: they stay, and so does what is added to them."""
    x = first(n)
    labels: torch.Tensor = p.labels[x]
    pads = argument(n, 1, "pad")
    rank = labels.dim()
    for k in range(len(pads) // 2):
        dim = rank - 1 - k
        left, right = pads[2 * k], pads[2 * k + 1]
        channels = varies(labels, dim) or (labels.numel() == 1 and dim == 1 and bool(labels.any()))
        if not channels or (left == 0 and right == 0):
            continue
        if not (isinstance(left, int) and isinstance(right, int)) or min(left, right) < 0:
            p.refuse(n, f"{describe(n)} of the channels by a computed or negative width")
        shape = list(labels.shape)
        sides = []
        for width in (left, right):
            shape[dim] = width
            sides.append(torch.zeros(shape, dtype=torch.long))
        labels = torch.cat([sides[0], labels, sides[1]], dim)
    return labels


def _pixel_shuffle(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    up = name_of(n) == "pixel_shuffle"
    factor = argument(n, 1, "upscale_factor" if up else "downscale_factor")
    return pixel_shuffled(p, n, first(n), value, factor, up)


def _channel_shuffle(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return channel_shuffled(p, n, first(n), argument(n, 1, "groups"))


def _weight_of(p: Propagator, n: fx.Node, position: int, name: str) -> tuple[nn.Module, str, str] | None:
    """The module, its path and the name of a parameter that is an argument of a functional layer."""
    node = argument(n, position, name)
    if node is None:
        return None
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        p.refuse(n, f"{describe(n)} with a computed {name}")
    path, _, tensor = str(node.target).rpartition(".")
    return p.model.get_submodule(path), path, tensor


def _functional_convolution(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    transposed = "transpose" in name_of(n)
    found = _weight_of(p, n, 1, "weight")
    assert found is not None
    owner, path, weight = found
    groups = argument(n, 5 if transposed else 6, "groups", 1)
    x = p.line(n, first(n), 1)
    if groups > 1:
        p.refuse(n, f"{describe(n)} of {groups} groups, a number in the code; use a module")
    labels = layer_rules.convolution(p, n, owner, path, x, 1, transposed, value, weight, weight + " has no bias")
    return _with_vectors(p, n, labels, 1, ((2, "bias"),))


def _functional_linear(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    found = _weight_of(p, n, 1, "weight")
    assert found is not None
    owner, path, weight = found
    labels = layer_rules.linear(p, owner, path, p.line(n, first(n), -1), value, weight, weight + " has no bias")
    return _with_vectors(p, n, labels, -1, ((2, "bias"),))


def _functional_batch_norm(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    vectors = ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias"))
    return _with_vectors(p, n, along(p.line(n, first(n), 1), 1, value.dim()), 1, vectors)


def _functional_layer_norm(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Channels that share their statistics stay; so does the shape, a constant in the code."""
    for a in n.all_input_nodes:
        p.keep_all(p.labels.get(a))
    return p.labels[first(n)]


def _prelu(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    labels = p.labels[first(n)]
    weight = argument(n, 1, "weight")
    return labels if p.env[weight].numel() == 1 else _with_vectors(p, n, labels, 1, ((1, "weight"),))


def _with_vectors(
    p: Propagator, n: fx.Node, labels: torch.Tensor, dim: int, vectors: Iterable[tuple[int, str]]
) -> torch.Tensor:
    """Join the channels in `dim` with vectors among the arguments."""
    for position, name in vectors:
        node = argument(n, position, name)
        if isinstance(node, fx.Node):
            p.joins.join(labels, along(p.labels[node].flatten(), dim, labels.dim()))
    return labels


def _like(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return p.labels[first(n)]


def _names(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_names(
        _unchanged,
        "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu selu_ celu gelu silu mish hardswish hardsigmoid "
        "hardtanh hardtanh_ sigmoid sigmoid_ tanh tanh_ softplus softsign threshold logsigmoid exp log log1p expm1 "
        "sqrt rsqrt square abs neg sign sin cos erf reciprocal round floor ceil clamp clamp_ clip clamp_min clamp_max "
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout stochastic_depth "
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "interpolate upsample contiguous clone detach to type float double half bfloat16 cpu cuda requires_grad_",
    ),
    **_names(
        _elementwise,
        "add add_ iadd sub sub_ isub rsub mul mul_ imul multiply div div_ truediv itruediv true_divide divide pow pow_ "
        "ipow maximum minimum where masked_fill addcmul addcdiv lerp eq ne gt ge lt le atan2 fmod remainder",
    ),
    **_names(
        _reduced,
        "mean sum amax amin max min var std norm prod all any logsumexp argmax argmin var_mean std_mean median",
    ),
    **_names(_mixing, "softmax log_softmax softmin cumsum cumprod flip"),
    "glu": _glu,
    "normalize": _normalised,
    **_names(
        _moved, "permute transpose swapaxes swapdims movedim moveaxis t squeeze unsqueeze repeat tile repeat_interleave"
    ),
    **_names(_reshape, "view reshape"),
    **_names(_flatten, "flatten ravel"),
    "unflatten": _unflatten,
    **_names(_expanded, "expand expand_as broadcast_to"),
    "roll": _rolled,
    **_names(_concatenated, "cat concat concatenate"),
    "stack": _stacked,
    **_names(_divided, "chunk split tensor_split"),
    "unbind": _unbound,
    "getitem": _indexed,
    **_names(_narrowed, "narrow select index_select"),
    "pad": _padded,
    **_names(_pixel_shuffle, "pixel_shuffle pixel_unshuffle"),
    "channel_shuffle": _channel_shuffle,
    **_names(_functional_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    "linear": _functional_linear,
    **_names(_functional_batch_norm, "batch_norm instance_norm"),
    **_names(_functional_layer_norm, "layer_norm group_norm rms_norm"),
    "prelu": _prelu,
    **_names(_like, "zeros_like ones_like"),
}

TAKES_WIDTHS = frozenset(
    ["view", "reshape", "unflatten", "expand", "expand_as", "broadcast_to", "split", "tensor_split", "chunk", "getitem"]
)
