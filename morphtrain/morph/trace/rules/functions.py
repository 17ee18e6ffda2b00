"""How functions and tensor methods treat channels, by name: torch's functions, operators and methods share theirs.

Here are the rules for functions that leave channels where they are, and the table of all rules.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import fx

from morphtrain.morph.trace.counts import Count, computed
from morphtrain.morph.trace.labelled import LabelledGraph
from morphtrain.morph.trace.labels import fixed, varies
from morphtrain.morph.trace.nodes import argument, call_name, dimensions, first, name_of, tensors_in
from morphtrain.morph.trace.rules import functional, movement, parts
from morphtrain.morph.trace.rules.moves import unchanged, windowed
from morphtrain.morph.trace.rules.table import Rule, by_name

# Functions with rules for arguments that depend on a number of channels.
TAKES_WIDTHS = frozenset(
    ["view", "reshape", "unflatten", "expand", "expand_as", "broadcast_to", "split", "tensor_split", "chunk", "getitem"]
)
TAKES_WIDTHS |= {"repeat", "new_zeros", "new_ones", "new_empty", "new_full"}
CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"))
TAKES_WIDTHS |= CONVOLUTIONS
NORMS = frozenset(("norm", "linalg_norm", "linalg_vector_norm"))  # the kind of norm stands before the dimension
WEIGHTED = CONVOLUTIONS | {"linear"}  # with rules for a weight of several dimensions


def follow(g: LabelledGraph, n: fx.Node, value: Any) -> Any:
    """The labels of a function's or method's result; refused if there is no rule for it."""
    home = "torch" if n.op == "call_method" else str(getattr(n.target, "__module__", None) or "torch")
    rule = RULES.get(name_of(n)) if home.startswith(("torch", "_operator")) else None
    if rule is None:
        g.refuse(n, call_name(n))
    if name_of(n) not in TAKES_WIDTHS:
        numbers = [count for a in n.all_input_nodes for count in g.counts_of(a)]
        g.need_constant(n, numbers, f"{call_name(n)}, which computes with a number of channels")
    for a in n.all_input_nodes:
        if a.op == "get_attr" and not (name_of(n) in WEIGHTED and argument(n, 1, "weight") is a):
            g.pin_values(a)
    return rule(g, n, value)


def keeps_channels(n: fx.Node) -> bool:
    """Whether a call of a function or method treats each channel by itself and moves none."""
    return RULES.get(name_of(n)) in (_unchanged, _elementwise)


def number(g: LabelledGraph, n: fx.Node, value: Any) -> None:
    """Note whether a value that is not a tensor depends on a number of channels; for a shape, whose shape it is."""
    if value is None and not all(map(g.is_fixed, n.all_input_nodes)):
        g.refuse(n, f"{call_name(n)}, which writes into its argument")  # x[...] = y
    of: Any = n.args[0] if n.args else None
    known = g.counts.get(of) if isinstance(of, fx.Node) else None
    count: Any = None
    if isinstance(known, tuple) and name_of(n) == "getitem":
        count = known[g.concrete(n.args[1])]
    elif any(map(g.is_width, n.all_input_nodes)):
        counts = [g.counts.get(a) if isinstance(a, fx.Node) else None for a in n.args]
        parts = [count.labels for a in n.all_input_nodes for count in g.counts_of(a)]
        count = computed(name_of(n), g.concrete(n.args), counts, value) or Count(torch.cat(parts), None)
    elif isinstance(of, fx.Node) and isinstance(g.values.get(of), torch.Tensor):
        count = _sizes(g, n, of, value)
    if count is not None:
        g.counts[n] = count


def _sizes(g: LabelledGraph, n: fx.Node, of: fx.Node, value: Any) -> Any:
    """What a shape, or a number read off the tensor `of`, counts."""
    if isinstance(value, torch.Size):
        counts = g.shape_counts(of)
        return counts if any(count is not None for count in counts) else None
    if name_of(n) == "size":
        return g.size(of, argument(n, 1, "dim"))
    if name_of(n) == "numel":
        parts = [count.labels for count in g.shape_counts(of) if count is not None]
        return Count(torch.cat(parts), Fraction(value, len(parts[0])) if len(parts) == 1 else None) if parts else None
    return None


def _unchanged(g: LabelledGraph, n: fx.Node, value: Any) -> Any:
    if sum(a in g.labels for a in n.all_input_nodes) > 1:
        g.refuse(n, f"{call_name(n)} of several tensors")
    return unchanged(g, n, first(n), value)


def _windowed(g: LabelledGraph, n: fx.Node, value: Any) -> Any:
    """A pool, or an interpolation: it mixes what lies in the dimensions that it slides over."""
    name, x = name_of(n), first(n)
    width = int(name[-2]) if name[-2:] in ("1d", "2d", "3d") else len(g.shape(x)) - 2
    return windowed(g, n, x, value, width)


def _elementwise(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """A sum, product, ...: entries at the same place are joined; an operand broadcast over the channels is pinned."""
    rank = value.dim()
    operands = [a for a in n.all_input_nodes if isinstance(g.labels.get(a), torch.Tensor)]
    labels = [g.labels[a].view([1] * (rank - g.labels[a].dim()) + list(g.labels[a].shape)) for a in operands]
    sizes = [[1] * (rank - len(g.shape(a))) + list(g.shape(a)) for a in operands]
    wide = [d for d in range(rank) if any(varies(label, d) for label in labels)]
    whole = []
    for label, size in zip(labels, sizes, strict=True):
        if any(size[d] == 1 and value.shape[d] != 1 for d in wide):
            g.joins.pin(label)
        elif wide or bool(label.any()) or list(size) == list(value.shape):
            whole.append(label)
    if not whole:
        return fixed(rank)
    for label in whole[1:]:
        g.joins.join(whole[0], label)
    return max(whole, key=torch.Tensor.numel)


def _reduced(g: LabelledGraph, n: fx.Node, value: Any) -> Any:
    """A mean, sum, maximum, ... over some dimensions; if it mixes channels, they cannot change."""
    x, wanted = first(n), argument(n, 2 if name_of(n) in NORMS else 1, "dim")
    if isinstance(wanted, fx.Node):  # the larger of two tensors
        return _elementwise(g, n, value)
    rank = len(g.shape(x))
    dims = dimensions(wanted, rank)
    mixes = g.pin_varying(x, dims)
    results = []
    for tensor in tensors_in(value):
        if mixes:
            results.append(fixed(tensor.dim()))
        elif tensor.dim() == rank:
            results.append(g.labels[x])
        else:
            labels = g.labels[x]
            results.append(labels.view([labels.shape[d] for d in range(rank) if d not in dims]))
    return results[0] if isinstance(value, torch.Tensor) else tuple(results)


def _mixing(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """softmax and the like along a dimension: channels in it cannot change."""
    g.pin_varying(first(n), dimensions(argument(n, 1, "dim"), value.dim()))
    labels: torch.Tensor = g.labels[first(n)]
    return labels


def _flipped(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    dims = n.args[1:] if len(n.args) > 2 else argument(n, 1, "dims")
    g.pin_varying(first(n), dimensions(dims, value.dim()))
    labels: torch.Tensor = g.labels[first(n)]
    return labels


def _glu(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """One half of a dimension gates the other."""
    dim = argument(n, 1, "dim", -1)
    labels: torch.Tensor = g.labels[first(n)]
    if not varies(labels, dim):
        return labels
    halves = labels.unflatten(dim, (2, -1))
    g.joins.tie(halves, dim % labels.dim())
    return labels.narrow(dim, 0, value.shape[dim])


def _normalised(g: LabelledGraph, n: fx.Node, value: Any) -> Any:
    g.pin_varying(first(n), dimensions(argument(n, 2, "dim", 1), value.dim()))
    return g.labels[first(n)]


def _response_norm(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Each channel is divided by what its neighbours have."""
    g.pin_varying(first(n), [1])
    labels: torch.Tensor = g.labels[first(n)]
    return labels


def _like(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return g.labels[first(n)]


RULES: dict[str, Rule] = {
    **movement.RULES,
    **parts.RULES,
    **functional.RULES,
    **by_name(
        _unchanged,
        "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu selu_ celu gelu silu mish hardswish hardsigmoid "
        "hardtanh hardtanh_ sigmoid sigmoid_ tanh tanh_ softplus softsign threshold logsigmoid exp log log1p expm1 "
        "sqrt rsqrt square abs neg sign sin cos erf reciprocal round floor ceil clamp clamp_ clip clamp_min clamp_max "
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout stochastic_depth "
        "bernoulli bernoulli_ contiguous clone detach to type float double half bfloat16 cpu cuda requires_grad_",
    ),
    **by_name(
        _windowed,
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "interpolate upsample",
    ),
    **by_name(
        _elementwise,
        "add add_ iadd sub sub_ isub rsub mul mul_ imul multiply div div_ truediv itruediv true_divide divide pow pow_ "
        "ipow maximum minimum where masked_fill addcmul addcdiv lerp eq ne gt ge lt le atan2 fmod remainder",
    ),
    **by_name(
        _reduced,
        "mean sum amax amin max min var std prod all any logsumexp argmax argmin var_mean std_mean median "
        "norm linalg_norm linalg_vector_norm",
    ),
    **by_name(_mixing, "softmax log_softmax softmin cumsum cumprod"),
    "flip": _flipped,
    "glu": _glu,
    "normalize": _normalised,
    "local_response_norm": _response_norm,
    **by_name(_like, "zeros_like ones_like"),
}
