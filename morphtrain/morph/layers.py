"""The few layers that structural changes need and torch does not have.

Their widths and indices are attributes rather than constants in a `forward`, so that a channel graph can change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._jit_internal import is_scripting
from torch.nn import functional as F

from morphtrain.morph.formats import format_of


class PadChannels(nn.Module):
    """Append zero channels before and after the input's channels (the option-A shortcut of He et al. 2015).

    (B, C, H, W) -> (B, left + C + right, H, W).
    """

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left = left
        self.right = right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, 0, self.left, self.right))

    def extra_repr(self) -> str:
        return f"left={self.left}, right={self.right}"


class SelectChannels(nn.Module):
    """Select the channels `index` of the input: what a gated layer reads. (B, C, H, W) -> (B, len(index), H, W)."""

    index: torch.Tensor

    def __init__(self, index: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(1, self.index).contiguous(memory_format=format_of(x))


class ScatterChannels(nn.Module):
    """Put the input's channels at positions `index` of `width` channels, zeros elsewhere: what a gated layer writes.

    (B, len(index), H, W) -> (B, width, H, W).
    """

    index: torch.Tensor

    def __init__(self, index: torch.Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(x.shape[0], self.width, *x.shape[2:]).contiguous(memory_format=format_of(x))
        return out.index_copy_(1, self.index, x)  # the out-of-place form loses the memory format

    def extra_repr(self) -> str:
        return f"width={self.width}"


class Gated(nn.Sequential):
    """A convolution with a `SelectChannels` before it, a `ScatterChannels` after it, or both."""


class ZeroBranch(nn.Module):
    """What a residual branch adds once it has no channels inside: the output of its last norm for zeros.

    (B, C', H, W) -> (1, C, 1, 1), which the sum broadcasts. With `stride`, the full (B, C, H/stride, W/stride), for
    code that adds in place or does something else before the sum. The norm behaves as after a convolution of zeros: in
    training mode it gives its bias and its running statistics decay; in evaluation mode it uses them.

    Args:
        channels: C.
        norm: the branch's last norm; None if it ends in a convolution.
        bias: (C,), of that convolution; None if it has none, in which case the branch adds zeros.
        stride: of the branch, (vertical, horizontal); None for the broadcast form.
    """

    if TYPE_CHECKING:  # torch.jit.script reads annotations and knows neither of these
        norm: Any
        bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        norm: nn.Module | None = None,
        bias: nn.Parameter | None = None,
        stride: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.norm = norm
        self.bias = bias
        self.stride = None if stride is None else list(stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Two positions, because batch norm refuses to train on one value per channel; all samples, because a norm may
        # depend on their number.
        out = x.new_zeros([x.shape[0], self.channels, 2, 1])  # len(x) would fix the batch of an export
        if self.bias is not None:
            out = out + self.bias.to(x.dtype).view(1, -1, 1, 1)  # or what follows the sum would be in the larger type
        if self.norm is not None:
            out = self.norm(out)
        out = out[:1, :, :1]
        if self.stride is None:
            return out
        height, width = _strided(x, self.stride)
        out = out.expand(x.shape[0], -1, height, width)
        return out.clone() if is_scripting() else out.clone(memory_format=format_of(x))

    def extra_repr(self) -> str:
        return f"channels={self.channels}" + (f", stride={self.stride}" if self.stride else "")


class NoChannels(nn.Module):
    """Replaces a layer that has no channels left. (B, C, H, W) -> (B, 0, H/stride, W/stride).

    The result is a new tensor, so that code that works in place does not write into this layer's input.
    """

    def __init__(self, stride: Sequence[int] = (1, 1)) -> None:
        super().__init__()
        self.stride = list(stride)

    def forward(self, x: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        first = x if isinstance(x, torch.Tensor) else x[0]  # DenseNet calls a layer with a list of inputs
        height, width = _strided(first, self.stride)
        return first.new_empty([first.shape[0], 0, height, width])

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class Scale(nn.Module):
    """A trainable factor for a tensor of any shape; `half_half` blocks scale both operands of a sum by it."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class InsertedLayer(nn.Sequential):
    """Convolution, norm and ReLU, inserted in front of a convolution. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, kernel: int, norm: nn.Module | None) -> None:
        layers = [nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=norm is None)]
        super().__init__(*layers, *([norm] if norm is not None else []), nn.ReLU())
        self.facts = {"kernel": kernel, "norm": norm is not None}


class InsertedBlock(nn.Module):
    """branch(x) + shortcut(x), inserted after a module. (B, C, H, W) -> (B, C, H, W).

    The branch is a chain of convolutions, each followed by a norm, with a ReLU between them.

    Args:
        channels: C.
        inner: channels between the convolutions.
        kernels: sizes of the convolutions' kernels, odd.
        norms: one for each convolution; empty in a network without norms.
        halves: whether both operands are scaled by a trainable factor that starts at 1/2.
        activation: whether a ReLU follows the sum.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        kernels: Sequence[int],
        norms: Sequence[nn.Module],
        halves: bool,
        activation: bool,
    ) -> None:
        super().__init__()
        widths = [channels, *[inner] * (len(kernels) - 1), channels]
        self.branch = nn.Sequential()
        for layer, kernel in enumerate(kernels):
            if layer:
                self.branch.append(nn.ReLU())
            self.branch.append(nn.Conv2d(widths[layer], widths[layer + 1], kernel, padding=kernel // 2, bias=not norms))
            if norms:
                self.branch.append(norms[layer])
        if halves:
            self.branch.append(Scale(0.5))
        self.shortcut = Scale(0.5) if halves else nn.Identity()
        self.activation = nn.ReLU() if activation else nn.Identity()
        self.facts = {"kernels": list(kernels), "norm": bool(norms), "halves": halves, "activation": activation}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.branch(x) + self.shortcut(x))


class Grown(nn.Sequential):
    """Replaces a module: that module, with what was inserted in front of it or after it.

    Code that reads an attribute of the module, such as its weight, finds it here.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name.isdigit():  # the names of its own modules
                raise
            for module in self.children():
                if not isinstance(module, (InsertedLayer, InsertedBlock)):
                    return getattr(module, name)
            raise


def _strided(x: torch.Tensor, stride: list[int]) -> tuple[int, int]:
    """The spatial size after layers of this total stride that otherwise keep the size."""
    return -(-x.shape[2] // stride[0]), -(-x.shape[3] // stride[1])


OWN_LAYERS = (PadChannels, SelectChannels, ScatterChannels, ZeroBranch, NoChannels, Scale)
