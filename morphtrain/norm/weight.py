"""Weight normalisation (Salimans and Kingma 2016, arXiv 1602.07868): the weight of a channel is g * v / ||v||.

    to_weight_norm(model)                   # before the optimizer is made: the parameters are new
    initialise(model, images)               # a batch of training images, before the first step

It takes the place of batch norm. Where that made every channel's mean 0 and deviation 1 in each step, g and the bias
start so that they are 0 and 1 on the first batch, and are trained from there.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from morphtrain import schema, world
from morphtrain.errors import UserError
from morphtrain.morph import MIXING, NORMS, TRANSPOSED, kept_modes
from morphtrain.morph.computation import computation, is_weight_norm, norm_dim, originals
from morphtrain.morph.formats import format_of
from morphtrain.norm.mean_only import MeanOnlyBatchNorm, to_mean_only

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, MeanOnlyBatchNorm)
LEAST = 1e-6  # deviation of a channel, as a share of its mean or of 1; one that varies less is a constant

log = logging.getLogger(__name__)


class WeightNorm(_WeightNorm):
    """torch's weight norm in the memory format of v, which a convolution goes by; torch's own is always contiguous.

    A channel whose weights are zero has length 0 and some direction; torch's own would compute 0 / 0.
    """

    def forward(self, weight_g: torch.Tensor, weight_v: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = super().forward(weight_g, weight_v)  # type: ignore[no-untyped-call]
        memory_format = format_of(weight_v)
        return weight if memory_format is torch.contiguous_format else weight.clone(memory_format=memory_format)

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length = torch.norm_except_dim(weight, 2, self.dim)
        return length, weight.masked_fill(length == 0, 1.0)


def to_weight_norm(model: nn.Module, mean_only: bool = False) -> int:
    """Give every convolution and linear layer of `model` weight norm, in place, and return how many there are.

    Batch norms go: each becomes a `nn.Identity`, and the layers get a bias if they have none. Left as they are: weights
    that several modules share or that are computed already, layers with a forward of their own, and transposed
    convolutions of several groups, whose output channels have no rows of their own.

    Args:
        mean_only: batch norms become mean-only ones instead, which have the bias.

    Raises:
        UserError: naming a norm that is left: of another kind, or with more in its forward than a batch norm's.
    """
    _check_norms(model)
    layers = list(_layers(model))
    for path, norm in list(model.named_modules(remove_duplicate=False)):
        if type(norm) in BATCH_NORMS and mean_only:
            to_mean_only(norm)
        elif type(norm) in BATCH_NORMS:
            model.set_submodule(path, nn.Identity().train(norm.training))
    for layer in layers:
        if layer.bias is None and not mean_only:
            outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            layer.bias = nn.Parameter(layer.weight.detach().new_zeros(outputs), layer.weight.requires_grad)
        norm = WeightNorm(dim=1 if isinstance(layer, TRANSPOSED) else 0)
        parametrize.register_parametrization(layer, "weight", norm, unsafe=True)
    return len(layers)


@torch.no_grad()
def initialise(model: nn.Module, images: torch.Tensor) -> list[str]:
    """Start every layer with weight norm from what a batch gives: g <- g / sigma, b <- (b - mu) / sigma (section 3).

    Here mu and sigma are mean and deviation of each of its output channels, with g and b as they are. It is one pass:
    what a layer gives is initialised before the next one sees it. A layer that is called several times starts from its
    first call. Without a bias only sigma is used, and a channel that does not vary keeps its g. Dropout is off;
    mean-only batch norms subtract the batch's mean. Modes stay.

    Args:
        images: (B, C, H, W), as training sees them; each of several processes has its own, one or more.

    Returns:
        the paths of the layers that the pass did not reach, which stay as they are.
    """
    waiting = {m: path for path, m in model.named_modules() if _is_normed(m)}

    def look(layer: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        if layer not in waiting:
            return out
        del waiting[layer]
        return _started(layer, out)

    handles = [layer.register_forward_hook(look) for layer in waiting]
    try:
        with kept_modes(model):
            model.eval()
            for module in model.modules():
                if isinstance(module, MeanOnlyBatchNorm):
                    module.training = True
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return list(waiting.values())


def _started(layer: Any, out: torch.Tensor) -> torch.Tensor:
    """Change a layer so that its output, on what gave it `out`, has mean 0 and deviation 1; returns that output."""
    dim = out.dim() + 1 - layer.weight.dim()  # of the channels
    rows = out.transpose(0, dim).flatten(1)  # (O, values)
    rows = rows.double() if rows.device.type != "mps" else rows.float()
    values = rows.shape[1]
    weight = (
        values * world.size() / sum(world.gathered(values))
    )  # 1, unless another process has other numbers of images
    mean = world.mean(weight * rows.mean(1))
    deviation = world.mean(weight * (rows - mean[:, None]).square().mean(1)).sqrt()
    varies = deviation > LEAST * mean.abs().clamp(min=1)
    scale = torch.where(varies, 1 / deviation, 1.0)
    g, _ = originals(layer.parametrizations["weight"])
    g.mul_(scale.to(g.dtype).view(g.shape))
    shift = torch.zeros_like(mean)
    if layer.bias is not None:
        layer.bias.copy_((layer.bias - mean) * scale)
        shift = -mean * scale
    shape = [-1 if d == dim else 1 for d in range(out.dim())]
    return (out * scale.view(shape) + shift.view(shape)).to(out.dtype)


def _is_normed(module: nn.Module) -> bool:
    """Whether a layer has a g for each of its output channels."""
    computed = computation(module, "weight") if isinstance(module, MIXING) else None
    if computed is None or not is_weight_norm(computed):
        return False
    return norm_dim(computed) == (1 if isinstance(module, TRANSPOSED) else 0) and not _is_grouped(module)


def _layers(model: nn.Module) -> Iterator[Any]:
    """The layers whose weights can have a length for each output channel."""
    holders = Counter(id(tensor) for m in model.modules() for tensor in m._parameters.values())
    for layer in model.modules():
        if type(layer) in MIXING and not _is_grouped(layer) and not parametrize.is_parametrized(layer, "weight"):
            weight = layer._parameters.get("weight")
            if weight is not None and holders[id(weight)] == 1:
                yield layer


def _is_grouped(layer: Any) -> bool:
    return isinstance(layer, TRANSPOSED) and layer.groups > 1


def _check_norms(model: nn.Module) -> None:
    """Raise a `UserError` for a norm that would stay on top of weight norm."""
    for path, module in model.named_modules():
        kinds = (*NORMS, nn.LayerNorm, nn.RMSNorm)
        if isinstance(module, kinds) and type(module) not in BATCH_NORMS:
            raise UserError(
                f"norm=weight: {path} is a {type(module).__name__}, which it does not replace; a model whose norms are "
                "batch norms, or one without, works"
            )


def build(config: schema.norm.WeightNorm, model: nn.Module) -> None:
    if to_weight_norm(model, config.mean_only) == 0:
        raise UserError("norm=weight: the model has no convolution or linear layer of torch's; norm=batch works")


def start(model: nn.Module, images: torch.Tensor) -> None:
    """What a run does before its first step, and again for new random weights."""
    missed = initialise(model, images)
    if missed:
        log.info("norm=weight: not reached by the initial pass, and left as they were: %s", ", ".join(missed))
