"""Batch norm over the whole batch of a training step, of whose images each process of a run has a part.

to_sync(model)    # before or after the optimizer is made: the parameters stay
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import distributed, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm as NormaliseOnGpu
from torch.nn.modules.batchnorm import _BatchNorm

from morphtrain import schema, world
from morphtrain.errors import UserError
from morphtrain.morph import exact

Statistics = tuple[torch.Tensor, torch.Tensor]  # running mean and variance, (C,) each


class Synchronised(_BatchNorm):
    """Batch norm that, in training, normalises by mean and variance of what all processes give it together.

    (B, C, ...) -> the same, in the same memory format; B may differ between processes, and be 0 in some. All have to
    call it, forward and backward, in the same order. Put together, the processes' outputs, gradients of inputs and
    running statistics are those of plain batch norm on the whole batch; the gradients of weight and bias are each
    process's own, and add up to those. In one process, and in evaluation, it is plain batch norm, whose state dict it
    has. In lower precision the statistics are computed in 32 bits.

    Raises:
        ValueError: in training, for a single value per channel in all processes together.
    """

    per_channel = True  # see `morphtrain.morph.trace.recording.Tracer`
    synchronises = True  # see `morphtrain.settling`

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or world.size() == 1:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return self._normalised(input)

    @_disable_dynamo  # compiled code cannot send messages; `torch.compiler.disable` would import the compiler at once
    def _normalised(self, input: torch.Tensor) -> torch.Tensor:
        running, momentum = None, 0.0
        if self.track_running_stats:
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            running = (self.running_mean, self.running_var)
            momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        if input.device.type != "cpu":
            return _normalise_on_gpu(input, self.weight, self.bias, running, momentum, self.eps)
        output: torch.Tensor = Normalise.apply(input, self.weight, self.bias, running, momentum, self.eps)
        return output


class SyncBatchNorm1d(Synchronised, nn.BatchNorm1d):
    """`nn.BatchNorm1d` over the images of all processes, see `Synchronised`."""


class SyncBatchNorm2d(Synchronised, nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the images of all processes, see `Synchronised`."""


class SyncBatchNorm3d(Synchronised, nn.BatchNorm3d):
    """`nn.BatchNorm3d` over the images of all processes, see `Synchronised`."""


KINDS: dict[type[nn.Module], type[Synchronised]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


class Normalise(torch.autograd.Function):
    """(x - mean) / deviation * `weight` + `bias`, with statistics over all processes; also updates `running`.

    One message each way: mean and squares of every process's own values, which add up exactly (Chan, Golub and LeVeque
    1983), and in the backward pass two sums a channel. Computed in 32 bits or more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running: Statistics | None,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        wide, count = exact(x), len(x) * math.prod(x.shape[2:])
        own_mean = _sum(wide) / max(count, 1)  # (C,)
        squares = F.mse_loss(wide, _spread(own_mean, x).expand_as(wide), reduction="none")
        own = torch.cat([own_mean, _sum(squares), own_mean.new_full((1,), count)])
        mean, var, total = _together(world.stacked(own))
        if total <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
        if running is not None:
            for statistic, new in zip(running, (mean, var * (total / (total - 1))), strict=True):
                statistic.copy_(exact(statistic) * (1 - momentum) + new * momentum)
        deviation = (var + eps).rsqrt()  # inverse
        scale = deviation if weight is None else deviation * exact(weight)
        shift = -scale * mean if bias is None else exact(bias) - scale * mean
        ctx.save_for_backward(x, weight, mean, deviation)
        ctx.total, ctx.has_bias = total, bias is not None
        return torch.addcmul(_spread(shift, x), wide, _spread(scale, x), out=squares).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dL/dx = w/sd * (g - mean(g) - x' * mean(g * x')), means over all processes and x' = (x - mean) / sd."""
        x, weight, mean, deviation = ctx.saved_tensors
        g, centred = exact(grad), exact(x) - _spread(mean, x)
        own_bias = _sum(g)  # (C,), as all that follow
        own_slope = _sum(g * centred) * deviation  # the sum of g * x'
        sums = torch.stack([own_bias, own_slope])
        world.sum_([sums])
        shift, slope = sums / ctx.total
        scale = deviation if weight is None else deviation * exact(weight)
        centred.mul_(_spread(-scale * deviation * slope, x)).addcmul_(g, _spread(scale, x))
        grad_x = centred.sub_(_spread(scale * shift, x)).to(x.dtype)
        grad_weight = None if weight is None else own_slope.to(weight.dtype)
        return grad_x, grad_weight, own_bias if ctx.has_bias else None, None, None, None


def _together(own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean and biased variance (C,), and the number of values, of all that processes have: (size, 2 * C + 1)."""
    channels = own.shape[1] // 2
    means, squares, counts = own.split([channels, channels, 1], 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (squares + counts * (means - mean).square()).sum(0) / total
    return mean, var, total.item()


def _normalise_on_gpu(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running: Statistics | None,
    momentum: float,
    eps: float,
) -> torch.Tensor:
    """What `Normalise` computes, by torch's own kernels, those of `nn.SyncBatchNorm`."""
    given = exact(x) if len(x) == 0 else x  # torch would send zeros of 16 bits where others send statistics of 32
    group, statistics = distributed.group.WORLD, running or (None, None)
    with world.meeting():
        output = NormaliseOnGpu.apply(given, weight, bias, *statistics, eps, momentum, group, world.size())
    normalised: torch.Tensor = output.to(x.dtype)
    return normalised


def _sum(x: torch.Tensor) -> torch.Tensor:
    """(B, C, ...) -> (C,); space first, which is faster and no less exact."""
    return (x.flatten(2).sum(2) if x.dim() > 2 else x).sum(0)


def _spread(channels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(C,) -> (1, C, 1, ...), as many dimensions as `x` has."""
    return channels.view(1, -1, *[1] * (x.dim() - 2))


def to_sync(model: nn.Module) -> int:
    """Let every batch norm of `model` synchronise, in place, and return how many there are.

    As with torch's lazy modules, the modules change class in place: parameters, buffers, modes, hooks and references to
    the modules are kept. `nn.SyncBatchNorm`, which does so by itself on GPUs, is left alone.

    Raises:
        UserError: naming a batch norm that is derived from torch's, whose forward may do anything.
    """
    norms = [(path, module) for path, module in model.named_modules() if isinstance(module, _BatchNorm)]
    found = 0
    for path, norm in norms:
        if type(norm) in KINDS:
            norm.__class__ = KINDS[type(norm)]
        elif not isinstance(norm, (Synchronised, nn.SyncBatchNorm)):
            raise UserError(
                f"norm=sync: {path} is a {type(norm).__name__}, which it cannot synchronise; a model of torch's own "
                "batch norms works, or norm=batch"
            )
        found += 1
    return found


def build(config: schema.norm.Norm, model: nn.Module) -> None:
    if to_sync(model) == 0:
        raise UserError("norm=sync: the model has no batch norm; choose norm=batch, or a model with batch norm")
