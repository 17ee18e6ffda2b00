"""New layers and blocks that leave a network's function unchanged (Net2DeeperNet, Chen et al. 2015, section 2.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from morphtrain.morph.errors import MorphError
from morphtrain.morph.formats import format_of_model
from morphtrain.morph.layers import Grown, InsertedBlock, InsertedLayer
from morphtrain.morph.modes import copy_of
from morphtrain.morph.number_types import in_type, input_type
from morphtrain.morph.surgery.rebind import Rebinder
from morphtrain.morph.surgery.statistics import Statistics, measure_inputs
from morphtrain.morph.trace.kinds import MIXING
from morphtrain.morph.trace.points import Point

Start = Literal["zero_gamma", "half_half"]


def insert_layers(
    model: nn.Module, paths: Sequence[str], calibration: Sequence[Any], kernel: int, rebinder: Rebinder
) -> list[str]:
    """See `ChannelGraph.insert_layer`; `paths` are places that it has checked."""
    _check_kernel(kernel)
    measure = partial(_measured, model, paths, calibration)
    statistics, averaged = measure(), _of_averages(model, rebinder, measure)
    inserted = []
    for path in paths:
        convolution: Any = model.get_submodule(path)
        layer = _make_layer(model, convolution.in_channels, kernel)
        _settle(layer, convolution, model)
        if statistics:
            _become_identities([layer[1]], [statistics[path]])
        model.set_submodule(path, Grown(layer, convolution))
        inserted.append(f"{path}.0")
        rebinder.adopt(model, layer.parameters(), like=convolution)
        if averaged:
            _average_identities(rebinder, [layer[1]], [averaged[path]])
    return inserted


def insert_block(
    model: nn.Module,
    point: Point,
    calibration: Sequence[Any],
    kernels: Sequence[int],
    inner: int | None,
    start: Start,
    rebinder: Rebinder,
) -> str:
    """See `ChannelGraph.insert_block`."""
    for kernel in kernels:
        _check_kernel(kernel)
    halves = start == "half_half"
    width = _identity_width(point, kernels) if halves else point.channels
    if halves and inner not in (None, width):
        raise MorphError(
            f"no half_half block with {inner} inner channels can be put after '{point.path}': an identity needs {width}"
        )
    place = model.get_submodule(point.path)
    neighbour = place if any(True for _ in place.parameters()) else model
    block = _make_block(model, point, width if inner is None else inner, kernels, start)
    _settle(block, neighbour, model)
    norms = [m for m in block.branch if isinstance(m, nn.BatchNorm2d)] if halves else []
    averaged: Mapping[str, Statistics] = {}
    entries = _entries(point.channels, width, len(norms))
    if norms:
        parts = None if width == point.channels else _parts
        measure = partial(_measured, model, [point.path], calibration, outputs=True, of=parts)
        found, averaged = measure(), _of_averages(model, rebinder, measure)
        _become_identities(norms, [found[point.path].of(some) for some in entries])
    inserted = _put_after(model, point, block)
    rebinder.adopt(model, block.parameters(), like=neighbour)
    if averaged:
        _average_identities(rebinder, norms, [averaged[point.path].of(some) for some in entries])
    return inserted


def _identity_width(point: Point, kernels: Sequence[int]) -> int:
    """The inner channels of a branch that passes on what it gets.

    Values that may be negative pass the ReLUs in it as x = ReLU(x) - ReLU(-x), on twice as many channels.
    """
    return point.channels if point.non_negative or len(kernels) == 1 else 2 * point.channels


def norm_like(model: nn.Module, channels: int) -> nn.Module | None:
    """A fresh norm with the settings of the first batch norm in `model`; None if it has none."""
    pattern = next((m for m in model.modules() if isinstance(m, nn.BatchNorm2d)), None)
    if pattern is None:
        return None
    norm: Any = copy_of(pattern)
    norm.num_features, norm.affine = channels, True
    parameter = next(model.parameters())
    for name in ("weight", "bias", "running_mean", "running_var"):
        old = getattr(pattern, name)
        if old is not None or name in ("weight", "bias"):  # an insertion needs what affine=False leaves out
            new = torch.zeros(channels, dtype=(parameter if old is None else old).dtype, device=parameter.device)
            setattr(norm, name, nn.Parameter(new) if name in ("weight", "bias") else new)
    norm.reset_parameters()
    return norm.train()


def _make_layer(model: nn.Module, channels: int, kernel: int) -> InsertedLayer:
    """An identity convolution with the network's kind of norm; `_become_identities` sets the norm's values."""
    layer = InsertedLayer(channels, kernel, norm_like(model, channels))
    nn.init.dirac_(layer[0].weight)  # type: ignore[arg-type]
    if layer[0].bias is not None:
        nn.init.zeros_(layer[0].bias)  # type: ignore[arg-type]
    return layer


def _make_block(model: nn.Module, point: Point, inner: int, kernels: Sequence[int], start: Start) -> InsertedBlock:
    """A block that adds nothing ("zero_gamma"), or the mean of its input and an identity branch ("half_half")."""
    widths = [*[inner] * (len(kernels) - 1), point.channels]
    norms = [norm for width in widths if (norm := norm_like(model, width)) is not None]
    block = InsertedBlock(point.channels, inner, kernels, norms, start == "half_half", point.non_negative)
    convolutions = [m for m in block.branch if isinstance(m, nn.Conv2d)]
    for convolution in convolutions:
        if start == "half_half":
            _pass_on(convolution, point.channels)
        else:  # He et al. 2015 (arXiv 1502.01852), with fan-out
            fan_out = math.prod(convolution.kernel_size) * convolution.out_channels
            nn.init.normal_(convolution.weight, 0, math.sqrt(2 / fan_out))
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
    if start == "zero_gamma":
        last: Any = norms[-1] if norms else convolutions[-1]
        nn.init.zeros_(last.weight)
    return block


@torch.no_grad()
def _pass_on(convolution: nn.Conv2d, channels: int) -> None:
    """Make a convolution of an identity branch pass on what it gets, of which there are `channels` at either end."""
    weight = nn.init.dirac_(convolution.weight)
    if convolution.out_channels > convolution.in_channels:
        weight[channels:] = -weight[:channels]
    elif convolution.in_channels > convolution.out_channels:
        weight[:, channels:] = -weight[:, :channels]


def _parts(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, 4 C, H, W): what the norms of an identity branch may get; see `_entries`."""
    return torch.cat([x, -x, x.relu(), (-x).relu()], 1)


def _entries(channels: int, width: int, norms: int) -> list[slice]:
    """Which of `_parts` each norm of an identity branch gets: x and -x, later the positive parts, at last x again."""
    ends = slice(channels)
    if width == channels:
        return [ends] * norms
    return [slice(width), *[slice(width, 2 * width)] * (norms - 2), ends]


def _become_identities(norms: Sequence[nn.Module], statistics: Sequence[Statistics]) -> None:
    """Make norms pass on values of these statistics, one's each, unchanged.

    In evaluation mode this is exact; in training, it is exact up to how much a batch's statistics deviate. A fresh norm
    (gamma 1, beta 0) would renormalise what an identity convolution passes on, the mistake of the thesis's operator.
    """
    with torch.no_grad():
        for norm, found in zip(norms, statistics, strict=True):
            n: Any = norm
            mean, var = (s.to(n.weight.dtype) for s in found)
            n.weight.copy_((var + n.eps).sqrt())
            n.bias.copy_(mean)
            if n.running_mean is not None:
                n.running_mean.copy_(mean)
                n.running_var.copy_(var)


def _of_averages(
    model: nn.Module, rebinder: Rebinder, measure: Callable[[], dict[str, Statistics]]
) -> dict[str, Statistics]:
    """What `measure` finds in the network of the averages; nothing if there are none."""
    if not rebinder.averages.values:
        return {}
    with rebinder.averages.in_place(model.parameters()):
        return measure()


def _average_identities(rebinder: Rebinder, norms: Sequence[nn.Module], statistics: Sequence[Statistics]) -> None:
    """Let the averages of new norms pass on what these get in the network of the averages, whose statistics differ."""
    for norm, found in zip(norms, statistics, strict=True):
        n: Any = norm
        rebinder.averages.values[n.weight].copy_((found.var + n.eps).sqrt())
        rebinder.averages.values[n.bias].copy_(found.mean)


def _put_after(model: nn.Module, point: Point, layer: nn.Module) -> str:
    """Put `layer` after the module at a point and return its path; a called Sequential that ends there gets longer."""
    parent_path, _, name = point.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    chained = point.in_call and isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward
    if chained and next(reversed(parent._modules)) == name:
        number = len(parent._modules)
        while str(number) in parent._modules:
            number += 1
        parent.add_module(str(number), layer)
        return f"{parent_path}.{number}" if parent_path else str(number)
    model.set_submodule(point.path, Grown(model.get_submodule(point.path), layer))
    return f"{point.path}.1"


def _check_kernel(kernel: int) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise MorphError(f"a kernel of {kernel} has no middle; an identity needs an odd one")


def _settle(new: nn.Module, neighbour: nn.Module, model: nn.Module) -> None:
    """Give a new module the device, number format and mode of its neighbour, and the memory format of the model.

    Its norms have the number format of the model's norms already.
    """
    weight = next(p for p in neighbour.parameters() if p.is_floating_point())
    like = neighbour if any(isinstance(m, MIXING) for m in neighbour.modules()) else model
    in_type(new.to(weight.device), input_type(like)).train(neighbour.training)
    new.to(memory_format=format_of_model(model))


def _measured(
    model: nn.Module,
    paths: Sequence[str],
    calibration: Sequence[Any],
    outputs: bool = False,
    of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, Statistics]:
    """The statistics that the norms of new layers need; empty if the network has no norms."""
    if norm_like(model, 1) is None:
        return {}
    if not len(calibration):
        raise MorphError("calibration: the norms of new layers need a batch of the model's inputs to measure")
    return measure_inputs(model, paths, calibration, outputs, of)
