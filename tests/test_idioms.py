"""Idioms of real networks: what code does with what calls return, with weights that are computed, with its layers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from networks import assert_close, check_surgery, facts, outputs
from test_widths_in_code import Body
from topologies import images
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from morphtrain.cost import estimate_memory
from morphtrain.morph import ChannelGraph, MorphError

KERNEL = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])).div(16).double()


class Net(Body):
    """`Body` with more that its function may use."""

    def __init__(self, function, out: int = 8) -> None:
        super().__init__(function, out)
        self.halves = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.seq = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.ReLU())
        self.wide, self.ups = nn.Linear(8, 8 * 4), nn.ConvTranspose2d(8, 7, 2, 2)
        self.eca, self.norm = nn.Conv1d(1, 1, 3, padding=1), nn.BatchNorm2d(8)
        self.circular, self.reflect = nn.CircularPad2d(1), nn.ReflectionPad3d((0, 0, 1, 1, 0, 0))
        self.response, self.pads = nn.LocalResponseNorm(3), nn.ConstantPad3d(1, 0.5)
        self.register_buffer("blur", KERNEL.expand(8, 1, 3, 3).clone())
        self.register_buffer("one_blur", KERNEL[None, None].clone())
        self.register_buffer("image_blur", KERNEL.expand(3, 1, 3, 3).clone())


def csp(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    parts = list(y.chunk(2, 1))
    parts.extend(half(parts[-1]) for half in m.halves)
    return torch.cat(parts, 1)


def drop_path(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """As in timm, where it does not drop."""
    shape = (y.shape[0],) + (1,) * (y.ndim - 1)
    return x + y * y.new_empty(shape).bernoulli_(1.0).div_(1.0)


def response(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """GRN of ConvNeXt V2."""
    norm = y.norm(p=2, dim=(2, 3), keepdim=True)
    return y * (norm / (norm.mean(1, keepdim=True) + 1e-6)) + y


def eca(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    weights = m.eca(y.mean((2, 3)).view(y.shape[0], 1, -1)).sigmoid()
    return y * weights.view(y.shape[0], -1, 1, 1).expand_as(y)


def generator(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Linear, view, norm, transposed convolution."""
    return m.ups(m.norm(m.wide(y.mean((2, 3))).view(y.shape[0], -1, 2, 2)))


# name -> (function, the channels that `head` reads, sizes of the spaces: written by hand)
FOLLOWED = {
    "cat by axis": (lambda m, x, y: torch.cat([x, y], axis=1), 16, [8, 8]),
    "stack by axis": (lambda m, x, y: torch.stack([x, y], axis=2).sum(axis=2), 8, [8]),
    "mean by axis": (lambda m, x, y: y - torch.mean(x, axis=(2, 3), keepdims=True), 8, [8]),
    "softmax by axis": (lambda m, x, y: torch.softmax(y, axis=2), 8, [8, 8]),
    "channel mean by axis": (lambda m, x, y: x * y.mean(axis=1, keepdims=True), 8, [8]),
    "x for input": (lambda m, x, y: torch.sum(x=y, axis=(2, 3), keepdims=True), 8, [8, 8]),
    "chunk by axis": (lambda m, x, y: torch.cat(torch.chunk(y, 2, dim=1)[::-1], dim=1), 8, [8, 4]),
    "list of chunk": (csp, 16, [8, 4]),
    "loop over split": (lambda m, x, y: sum(p for p in y.split(y.shape[1] // 2, 1)), 4, [8, 4]),
    "zip of chunks": (
        lambda m, x, y: torch.cat([h(p) for h, p in zip(m.halves, y.chunk(2, 1), strict=True)], 1), 8, [4, 4, 4, 8]
    ),
    "chunks as arguments": (lambda m, x, y: torch.maximum(*y.chunk(2, dim=1)), 4, [8, 4]),
    "how many chunks": (lambda m, x, y: y / len(y.chunk(4, 1)), 8, [2, 8]),
    "cat of split": (lambda m, x, y: torch.cat(y.split(2, 1)[::-1], 1), 8, [8]),
    "cat of split by name": (lambda m, x, y: torch.cat(tensors=y.split(2, 1)[1:], dim=1), 6, [8]),
    "unbind": (lambda m, x, y: torch.stack([r.relu() for r in y.unbind(2)], 2), 8, [8, 8]),
    "unbind channels": (lambda m, x, y: torch.stack(y.unbind(1)[::-1], 1), 8, [8]),
    "star of a shape": (lambda m, x, y: y.flatten(2).view(*x.shape[:2], *y.shape[2:]), 8, [8]),
    "dimensions asked": (lambda m, x, y: x + y if y.dim() == 4 and len(x.shape) == 4 else y, 8, [8]),
    "view_as": (lambda m, x, y: y.flatten(2).view_as(x), 8, [8]),
    "blur": (lambda m, x, y: F.conv2d(F.pad(y, (1, 1, 1, 1), "reflect"), m.blur, groups=y.shape[1]), 8, [8, 8]),
    "blur by another's width": (lambda m, x, y: F.conv2d(y, m.blur, groups=x.shape[1]), 8, [8]),
    "blur by a constant": (lambda m, x, y: F.conv2d(y, m.blur, groups=8), 8, [8]),
    "blur by one kernel": (
        lambda m, x, y: F.conv2d(y, m.one_blur.expand(y.shape[1], -1, -1, -1), groups=y.shape[1]), 8, [8, 8]
    ),
    "blur by copies": (
        lambda m, x, y: F.conv2d(y, m.one_blur.repeat(y.shape[1], 1, 1, 1), groups=y.shape[1]), 8, [8, 8]
    ),
    "blur upwards": (lambda m, x, y: F.conv_transpose2d(y, m.blur, stride=2, groups=y.shape[1]), 8, [8, 8]),
    "fixed filter": (lambda m, x, y: F.conv2d(y, m.blur.transpose(0, 1).expand(8, 8, 3, 3)) if 0 else y, 8, [8, 8]),
    "linear to transposed": (generator, 7, [8, 8, 8, 7]),
    "drop path": (drop_path, 8, [8]),
    "global response norm": (response, 8, [8]),
    "channel attention": (eca, 8, [8]),
    "local response norm": (lambda m, x, y: m.response(y) + F.local_response_norm(x, 3), 8, []),
    "circular padding": (lambda m, x, y: m.circular(y), 8, [8, 8]),
    "3d paddings": (lambda m, x, y: m.reflect(y[:, :, None])[:, :, 0] + m.pads(x[:, :, None])[:, :, 1, 1:-1, 1:-1]
                    .repeat(1, 1, 1, 1)[:, :, :8, :8].mean((2, 3), keepdim=True), 8, [8]),
    "circular padding of the channels": (
        lambda m, x, y: F.pad(y[:, None], (0, 0, 0, 0, 1, 1), "circular")[:, 0], 10, [8]
    ),
    "part of a Sequential": (lambda m, x, y: m.seq[2:](m.seq[:2](y)), 8, [8, 8, 6, 8]),
    "linear over positions": (lambda m, x, y: m.wide(y), 8, [8]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_idioms_are_followed(name: str) -> None:
    function, out, sizes = FOLLOWED[name]
    torch.manual_seed(0)
    graph = ChannelGraph.trace(Net(function, out).double(), images())
    assert sorted(space.size for space in graph.spaces) == sorted(sizes)
    check_surgery(Net(function, out), (images(),), tolerance=1e-8, spaces=bool(sizes))
