"""The removal of a branch: what stands in for it, and the axes that this has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from morphtrain.morph.layers import NoChannels, ZeroBranch
from morphtrain.morph.spaces import Axis, Segment, Slot
from morphtrain.morph.surgery.rebind import Rebinder
from morphtrain.morph.trace.branches import Branch


def replace_branch(model: nn.Module, branch: Branch, optimizer: Optimizer | None) -> ZeroBranch | NoChannels:
    """Take a branch out of `model` and out of the optimizer; returns the layer that stands in for it."""
    stand_in = _stand_in(model, branch)
    stand_in.training = model.get_submodule(branch.place).training
    before = [p for path in branch.parts for p in model.get_submodule(path).parameters()]
    for path in branch.parts:
        model.set_submodule(path, stand_in if path == branch.place else NoChannels())
    if optimizer is not None:
        left = set(model.parameters())
        Rebinder({}, optimizer).forget([p for p in before if p not in left])
    return stand_in


def inherited_axis(axes: Sequence[Axis], branch: Branch, stand_in: ZeroBranch) -> Axis:
    """The axis of a stand-in's channels, with slots in the spaces of the outputs of the branch.

    Args:
        axes: those of the branch; the ones of the norm that stays get its new path.
    """
    for axis in axes:
        if axis.module is stand_in.norm:
            axis.path = f"{branch.place}.norm"
    outputs = next(
        a
        for a in axes
        if (a.module is stand_in.norm and a.counter in ("num_features", "num_channels"))
        or (stand_in.norm is None and a.path == branch.last and a.role == "produces")
    )
    tensors = (("bias", 0),) if stand_in.bias is not None else ()
    axis = Axis(branch.place, stand_in, "elementwise", tensors, "channels", [])
    for segment in outputs.segments:
        axis.segments.append(Segment(segment.space, segment.span, segment.fixed_size))
        if segment.space:
            segment.space.slots.append(Slot(axis, axis.segments[-1]))
    return axis


def _stand_in(model: nn.Module, branch: Branch) -> ZeroBranch | NoChannels:
    if branch.kind == "cat":
        return NoChannels(branch.stride)
    stride = branch.stride if branch.in_full else None
    last: Any = model.get_submodule(branch.last)
    if not branch.norm:
        return ZeroBranch(last.out_channels, bias=last.bias, stride=stride)
    norm: Any = model.get_submodule(branch.norm)
    channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    if last.bias is not None and getattr(norm, "running_mean", None) is not None:
        norm.running_mean -= last.bias.detach()  # the norm's input was the bias, and is zero from now on
    return ZeroBranch(channels, norm, stride=stride)
