"""Dead channels are not always zero: after a norm with weight zero each is a constant, which must stay when it goes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from morphtrain.morph import MIXING, SAMPLES, ChannelGraph, Space, input_type, kept_modes, restored

CONSTANTS = ("bias", "running_mean")  # what a channel's value consists of besides its weights


@torch.no_grad()
def fold_constants(graph: ChannelGraph, images: torch.Tensor, dead: Mapping[Space, torch.Tensor]) -> None:
    """Move what dead channels add, on average over `images`, into the layers that read them, and set them to zero.

    The mean of a channel times the weights goes into the running mean of the norm after the layer, or without one into
    the layer's bias; the channel's own biases become zero. In evaluation mode the network computes what it did before,
    if the channel is a constant and no zero padding cuts it off at the edges. In training mode a batch norm after the
    layer removes the constant in any case. For a layer without norm and bias, what the channels add is lost.

    Args:
        images: (B, C, H, W), a batch of the training set.
        dead: masks (size,) of channels whose weights (of the norms, or of what makes them) are zero or will be.
    """
    for target, parts in _mean_contributions(graph, images, dead):
        target += torch.stack(parts).mean(0)
    for space, mask in dead.items():
        for slot in space.slots:
            span = slot.segment.span
            rows = (slot.start + mask.cpu().nonzero() * span + torch.arange(span)).flatten()
            for name, dim in slot.axis.tensors:
                if slot.role != "consumes" and name in CONSTANTS:
                    tensor = getattr(slot.axis.module, name)
                    tensor.index_fill_(dim, rows.to(tensor.device), 0.0)


@torch.no_grad()
def constant_output(graph: ChannelGraph, dead: str, last: str) -> torch.Tensor | None:
    """What the convolution `last` puts out in evaluation mode, besides its bias, if the layer `dead` gets zeros: (O,).

    None if that is not the same at every position and in every sample, in either mode: where zero padding cuts a
    constant off.

    Args:
        dead, last: paths; everything on its way to `last` passes `dead`.
    """
    model: Any = graph.model
    layer, found = model.get_submodule(last), []
    handles = [
        model.get_submodule(dead).register_forward_pre_hook(lambda m, args: (torch.zeros_like(args[0]), *args[1:])),
        layer.register_forward_hook(lambda m, args, out: found.append(out)),
    ]
    inputs = graph.example_input if isinstance(graph.example_input, (tuple, list)) else (graph.example_input,)
    try:
        with restored(model):
            for training in (False, True):  # in this order: training moves the norms' statistics
                model.train(training)(*(_blank(x, layer.weight) for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
    for out in found:
        if (out - out[:1, :, :1, :1]).abs().max() > 100 * torch.finfo(out.dtype).eps * out.abs().max():
            return None
    constant: torch.Tensor = found[0][0, :, 0, 0]
    return constant if layer.bias is None else constant - layer.bias


def _blank(x: Any, like: torch.Tensor) -> Any:
    """A batch of zeros of the shape of an example input, on the device and in the precision of `like`."""
    if not isinstance(x, torch.Tensor):
        return x
    shape = (SAMPLES, *x.shape[1:]) if x.dim() else ()
    return torch.zeros(shape, dtype=like.dtype if x.is_floating_point() else x.dtype, device=like.device)


def _mean_contributions(
    graph: ChannelGraph, images: torch.Tensor, dead: Mapping[Space, torch.Tensor]
) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """What takes a constant in (a bias, or minus a running mean), and the constants (O,), one for each call."""
    found: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
    masks = _dead_inputs(graph, dead)
    norms: dict[str, list[str]] = {path: [] for path in masks}  # the norm after each call, in their order
    for call in graph.calls:
        if call.path in masks:
            norms[call.path].append(call.norm)

    def look(path: str, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        target, sign = _target(graph.model, module, norms[path].pop(0))
        if target is not None:
            mean = _contribution(module, args[0], masks[path])
            found.setdefault(id(target), (target, []))[1].append(sign * mean)

    layers = {path: graph.model.get_submodule(path) for path in masks}
    handles = [layer.register_forward_pre_hook(partial(look, path)) for path, layer in layers.items()]
    try:
        with kept_modes(graph.model):
            graph.model.eval()(images.to(input_type(graph.model)))
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _dead_inputs(graph: ChannelGraph, dead: Mapping[Space, torch.Tensor]) -> dict[str, torch.Tensor]:
    """path -> mask of the dead entries along the input axis, for layers that have any."""
    masks = {}
    for axis in graph.axes:
        if axis.role != "consumes" or not any(segment.space in dead for segment in axis.segments):
            continue
        mask = torch.zeros(axis.length, dtype=torch.bool)
        for start, segment in axis.placed():
            if segment.space is not None and segment.space in dead:
                entries = dead[segment.space].cpu().repeat_interleave(segment.span)
                mask[start : start + segment.length] = entries
        if mask.any() and axis.path and isinstance(axis.module, MIXING):
            masks[axis.path] = mask
    return masks


def _target(model: nn.Module, module: Any, norm: str) -> tuple[torch.Tensor | None, float]:
    """Where to add a constant that `module` will no longer put out, and with which sign; None if there is no place."""
    running_mean = getattr(model.get_submodule(norm), "running_mean", None) if norm else None
    return (module.bias, 1.0) if running_mean is None else (running_mean, -1.0)


def _contribution(module: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(O,): the mean over samples and positions of what the masked inputs add to the outputs."""
    channels = 1 - module.weight.dim()  # the dimension of activations that channels lie in
    groups = x.shape[channels] // len(mask)  # whose inputs share the weight's columns
    shape = [1] * x.dim()
    shape[channels] = -1
    kept = mask.repeat(groups).to(x).view(shape)
    out = module.forward(x * kept)
    mean: torch.Tensor = out.transpose(0, channels).flatten(1).mean(1)
    return mean if module.bias is None else mean - module.bias
