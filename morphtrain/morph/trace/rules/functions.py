"""How functions and tensor methods treat channels, by their name: torch's functions, operators and methods share them.

Those that move channels are in `movement_rules.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from morphtrain.morph.trace.labels import along, fixed, varies
from morphtrain.morph.trace.nodes import argument, describe, dimensions, first, name_of, tensors_in
from morphtrain.morph.trace.rules import layers as layer_rules
from morphtrain.morph.trace.rules import movement as movement_rules
from morphtrain.morph.trace.rules.movement import TAKES_WIDTHS, Rule, by_name

if TYPE_CHECKING:
    from morphtrain.morph.trace.propagator import Propagator


def follow(p: Propagator, n: fx.Node, value: Any) -> Any:
    """The labels of a function's or method's result; refused if there is no rule for it."""
    home = "torch" if n.op == "call_method" else str(getattr(n.target, "__module__", None) or "torch")
    rule = RULES.get(name_of(n)) if home.startswith(("torch", "_operator")) else None
    if rule is None:
        p.refuse(n, describe(n))
    if name_of(n) not in TAKES_WIDTHS and any(map(p.is_width, n.all_input_nodes)):
        p.refuse(n, f"{describe(n)}, which computes with a number of channels")
    return rule(p, n, value)


def number(p: Propagator, n: fx.Node, value: Any) -> None:
    """Note whether a value that is no tensor depends on a number of channels; of a shape, whose shape it is."""
    if value is None and not all(map(p.is_fixed, n.all_input_nodes)):
        p.refuse(n, f"{describe(n)}, which changes what it is given")  # x[...] = y
    name, of = name_of(n), n.args[0] if n.args else None
    sized: Any = of
    dims: Sequence[int] = ()
    if not isinstance(of, fx.Node):
        return
    if name == "getitem" and "dims of" in of.meta:  # of a shape
        sized, known = of.meta["dims of"]
        dims = known[n.args[1]] if isinstance(n.args[1], slice) else [known[n.args[1]]]
    elif any(map(p.is_width, n.all_input_nodes)):
        p.widths.add(n)
        return
    elif isinstance(p.labels.get(of), torch.Tensor):
        rank = len(p.shape(of))
        if isinstance(value, torch.Size) or name == "numel":
            dims = range(rank)
        elif name == "size":
            dims = [argument(n, 1, "dim") % rank]
    if isinstance(value, (tuple, list)):
        n.meta["dims of"] = (sized, dims)
    elif any(p.has_channels(sized, dim) for dim in dims):
        p.widths.add(n)


def unchanged(p: Propagator, n: fx.Node, x: fx.Node, value: Any) -> torch.Tensor:
    """Labels behind an operation that treats every channel by itself and moves none."""
    labels: torch.Tensor = p.labels[x]
    fits = isinstance(value, torch.Tensor) and value.dim() == labels.dim()
    if not fits or any(varies(labels, d) and value.shape[d] != labels.shape[d] for d in range(labels.dim())):
        p.refuse(n, f"{describe(n)}, which changes the dimension of the channels")
    return labels


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
    x, wanted = first(n), argument(n, 1, "dim")
    if isinstance(wanted, fx.Node):  # the larger of two tensors
        return _elementwise(p, n, value)
    rank = len(p.shape(x))
    dims = dimensions(wanted, rank)
    mixes = p.keep_varying(x, dims)
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


def _mixing(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """softmax and the like along a dimension: channels in it stay."""
    p.keep_varying(first(n), dimensions(argument(n, 1, "dim"), value.dim()))
    labels: torch.Tensor = p.labels[first(n)]
    return labels


def _flipped(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    dims = n.args[1:] if len(n.args) > 2 else argument(n, 1, "dims")
    p.keep_varying(first(n), dimensions(dims, value.dim()))
    labels: torch.Tensor = p.labels[first(n)]
    return labels


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
    p.keep_varying(first(n), dimensions(argument(n, 2, "dim", 1), value.dim()))
    return p.labels[first(n)]


def _weight_of(p: Propagator, n: fx.Node) -> tuple[nn.Module, str, str]:
    """The module, its path and the name of the parameter that is the weight of a functional layer."""
    node = argument(n, 1, "weight")
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        p.refuse(n, f"{describe(n)} with a computed weight")
    path, _, name = str(node.target).rpartition(".")
    owner = p.model.get_submodule(path)
    if name not in owner._parameters:
        p.refuse(n, f"{describe(n)} with a weight that is no parameter")
    return owner, path, name


def _functional_convolution(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    transposed = "transpose" in name_of(n)
    groups = argument(n, 5 if transposed else 6, "groups", 1)
    if groups > 1:
        p.refuse(n, f"{describe(n)} of {groups} groups, a number in the code; use a module")
    owner, path, weight = _weight_of(p, n)
    labels = layer_rules.convolution(p, owner, path, p.line(n, first(n), 1), 1, transposed, value, weight, bias=None)
    return _with_vectors(p, n, labels, 1, ((2, "bias"),))


def _functional_linear(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    owner, path, weight = _weight_of(p, n)
    labels = layer_rules.linear(p, owner, path, p.line(n, first(n), -1), value, weight, bias=None)
    return _with_vectors(p, n, labels, -1, ((2, "bias"),))


def _functional_batch_norm(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    vectors = ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias"))
    return _with_vectors(p, n, along(p.line(n, first(n), 1), 1, value.dim()), 1, vectors)


def _functional_layer_norm(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Channels that share their statistics stay; so does the shape, a constant in the code."""
    p.keep_inputs(n)
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


RULES: dict[str, Rule] = {
    **movement_rules.RULES,
    **by_name(
        _unchanged,
        "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu selu_ celu gelu silu mish hardswish hardsigmoid "
        "hardtanh hardtanh_ sigmoid sigmoid_ tanh tanh_ softplus softsign threshold logsigmoid exp log log1p expm1 "
        "sqrt rsqrt square abs neg sign sin cos erf reciprocal round floor ceil clamp clamp_ clip clamp_min clamp_max "
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout stochastic_depth "
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "interpolate upsample contiguous clone detach to type float double half bfloat16 cpu cuda requires_grad_",
    ),
    **by_name(
        _elementwise,
        "add add_ iadd sub sub_ isub rsub mul mul_ imul multiply div div_ truediv itruediv true_divide divide pow pow_ "
        "ipow maximum minimum where masked_fill addcmul addcdiv lerp eq ne gt ge lt le atan2 fmod remainder",
    ),
    **by_name(
        _reduced,
        "mean sum amax amin max min var std prod all any logsumexp argmax argmin var_mean std_mean median",
    ),
    **by_name(_mixing, "softmax log_softmax softmin cumsum cumprod"),
    "flip": _flipped,
    "glu": _glu,
    "normalize": _normalised,
    **by_name(_functional_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    "linear": _functional_linear,
    **by_name(_functional_batch_norm, "batch_norm instance_norm"),
    **by_name(_functional_layer_norm, "layer_norm group_norm rms_norm"),
    "prelu": _prelu,
    **by_name(_like, "zeros_like ones_like"),
}
