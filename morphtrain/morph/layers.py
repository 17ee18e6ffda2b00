"""The few layers that structural changes need and torch does not have.

Their widths and indices are attributes, not constants in a `forward`, so that a channel graph can change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
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
    """The input's channels `index`: what a gated layer reads. (B, C, H, W) -> (B, len(index), H, W)."""

    index: torch.Tensor

    def __init__(self, index: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(1, self.index).contiguous(memory_format=format_of(x))


class ScatterChannels(nn.Module):
    """The input's channels at `index` of `width` channels, zeros elsewhere: where a gated layer writes.

    (B, len(index), H, W) -> (B, width, H, W).
    """

    index: torch.Tensor

    def __init__(self, index: torch.Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(x.shape[0], self.width, *x.shape[2:]).contiguous(memory_format=format_of(x))
        return out.index_copy_(1, self.index, x)  # its out-of-place form forgets the format

    def extra_repr(self) -> str:
        return f"width={self.width}"


class Gated(nn.Sequential):
    """A convolution with a `SelectChannels` before it, a `ScatterChannels` behind it, or both."""


class ZeroBranch(nn.Module):
    """What a residual branch still adds when no channel is left inside it: its last norm, applied to zeros.

    (B, C', H, W) -> (1, C, 1, 1), to be broadcast by the sum; with `stride` (B, C, H/stride, W/stride) in full, for
    code that adds in place or goes on before the sum. Training mode yields the norm's bias and decays its running
    statistics; evaluation mode uses them: exactly what the norm behind an all-zero convolution does. A branch that
    ends in a convolution leaves that one's `bias`, or nothing but zeros.
    """

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
        # Two positions: batch norm refuses to train on a single value per channel. All samples: a norm may count them.
        out = x.new_zeros(len(x), self.channels, 2, 1)
        if self.bias is not None:
            out = out + self.bias.view(1, -1, 1, 1)
        if self.norm is not None:
            out = self.norm(out)
        out = out[:1, :, :1]
        if self.stride is None:
            return out
        return out.expand(x.shape[0], -1, *_strided(x, self.stride)).clone(memory_format=format_of(x))

    def extra_repr(self) -> str:
        return f"channels={self.channels}" + (f", stride={self.stride}" if self.stride else "")


class NoChannels(nn.Module):
    """In the place of a layer of which no channel is left. (B, C, H, W) -> (B, 0, H/stride, W/stride).

    A new tensor: code that goes on in place must not write into this layer's input.
    """

    def __init__(self, stride: Sequence[int] = (1, 1)) -> None:
        super().__init__()
        self.stride = list(stride)

    def forward(self, x: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        first = x if isinstance(x, torch.Tensor) else x[0]  # a dense layer is called with the list of its inputs
        return first.new_empty(first.shape[0], 0, *_strided(first, self.stride))

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class Scale(nn.Module):
    """A trainable factor on everything that passes: half of what `half_half` needs. Any shape."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class InsertedLayer(nn.Sequential):
    """Convolution, norm and ReLU, put in front of a convolution. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, kernel: int, norm: nn.Module | None) -> None:
        layers = [nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=norm is None)]
        super().__init__(*layers, *([norm] if norm is not None else []), nn.ReLU())
        self.facts = {"kernel": kernel, "norm": norm is not None}


class InsertedBlock(nn.Module):
    """branch(x) + shortcut(x), put behind a module; the branch is a chain of convolution and norm, ReLU in between.

    (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        inner: channels between its convolutions.
        kernels: of its convolutions.
        norms: one for each convolution; none for a network without.
        halves: both operands are scaled by a trainable 1/2.
        activation: whether a ReLU follows.
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
    """In the place of a module: that module, and what was inserted in front of or behind it."""


def _strided(x: torch.Tensor, stride: Sequence[int]) -> list[int]:
    """The spatial size behind layers of this total stride that keep the size otherwise."""
    return [-(-size // step) for size, step in zip(x.shape[2:], stride, strict=True)]


OWN_LAYERS = (PadChannels, SelectChannels, ScatterChannels, ZeroBranch, NoChannels, Scale)
