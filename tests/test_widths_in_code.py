"""What a model's code does with numbers of channels, with modes and with chance, beside calling layers."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from networks import check_surgery, outputs
from topologies import images
from torch import nn
from torch.nn import functional as F

from morphtrain.morph import ChannelGraph, MorphError


class Body(nn.Module):
    """Two layers of 8 channels and one of 6, a function of them in between, and a classifier."""

    def __init__(self, function, out: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.gate = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1) / 3)
        self.pool, self.pad = nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0)), nn.ZeroPad2d((1, 1, 0, 0))
        self.function, self.head = function, nn.Conv2d(out, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        return self.head(self.function(self, x, self.b(x))).mean((2, 3))


def reshaped_by_other(m: Body, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    return y.view(b, c, h * w).view(b, c, h, w)


def halves_and_rest(m: Body, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    one, other = y.split([y.size(1) // 2, y.size(1) - y.size(1) // 2], 1)
    return torch.cat([other, one], 1)


def pooled_last(m: Body, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y = F.avg_pool1d(y.flatten(2).transpose(1, 2), 3, 1, 1)
    return y.transpose(1, 2).unflatten(2, (8, 8))


# name -> (function, the channels that `head` reads, sizes of the spaces: written by hand)
FOLLOWED = {
    "view by another's width": (reshaped_by_other, 8, [8]),
    "view by another's shape": (lambda m, x, y: y.flatten(2).reshape(x.shape), 8, [8]),
    "view by part of another's shape": (lambda m, x, y: y.flatten(2).view(x.shape[:2] + x.shape[2:]), 8, [8]),
    "view by another's half": (lambda m, x, y: y.view(-1, 2, x.shape[1] // 2, 8, 8).flatten(1, 2), 8, [4]),
    "view by a weight's size": (lambda m, x, y: F.conv2d(y, m.weight).view(-1, m.weight.shape[0], 8, 8), 8, [8, 8, 8]),
    "expand_as": (lambda m, x, y: torch.cat([x, y.mean((2, 3), keepdim=True).expand_as(x)], 1), 16, [8]),
    "expand": (lambda m, x, y: torch.cat([x, y.mean((2, 3), keepdim=True).expand(x.shape)], 1), 16, [8]),
    "expand by one size": (lambda m, x, y: y.mean((2, 3), keepdim=True).expand(-1, x.size(1), 8, 8), 8, [8]),
    "one channel expanded": (lambda m, x, y: y * x.mean(1, keepdim=True).expand_as(y), 8, [8]),
    "expand by a constant": (lambda m, x, y: y.mean((2, 3), keepdim=True).expand(-1, 8, 8, 8), 8, [8]),
    "split by another's width": (lambda m, x, y: torch.cat([y, y], 1).split(x.shape[1], 1)[1], 8, [8]),
    "split into two widths": (
        lambda m, x, y: torch.cat([y, m.c(x)], 1).split([x.shape[1], m.c(x).shape[1]], 1)[0], 8, [8, 6]
    ),
    "split into a half and the rest": (halves_and_rest, 8, [8, 4]),
    "slice by another's width": (lambda m, x, y: torch.cat([y, m.c(x)], 1)[:, : x.shape[1]], 8, [8, 6]),
    "slice behind another's width": (lambda m, x, y: torch.cat([y, m.c(x)], 1)[:, x.shape[1] :], 6, [8, 6]),
    "slice by another's half": (lambda m, x, y: y[:, : x.shape[1] // 2], 4, [4, 4]),
    "slice from the end": (lambda m, x, y: torch.cat([m.c(x), y], 1)[:, -x.shape[1] :], 8, [8, 6]),
    "slice by a quarter": (lambda m, x, y: y[:, : 3 * y.shape[1] // 4], 6, [8, 2]),
    "slice by a width less a constant": (lambda m, x, y: y[:, : x.shape[1] - 4], 4, [4]),
    "slice by a constant less a width": (lambda m, x, y: y[:, : 12 - x.shape[1]], 4, [4]),
    "two widths as one size": (lambda m, x, y: torch.cat([x, y], 1).view(-1, x.size(1) + y.size(1), 8, 8), 16, [8, 8]),
    "rows as long as the image is wide": (lambda m, x, y: y.view(-1, 8, 8, x.shape[1]), 8, []),
    "pool over channels": (lambda m, x, y: F.avg_pool3d(y[:, None], (3, 1, 1), 1, (1, 0, 0))[:, 0], 8, [8]),
    "pool layer over channels": (lambda m, x, y: m.pool(y[:, None])[:, 0], 8, [8]),
    "pool over channels last": (pooled_last, 8, [8]),
    "padding of the channels": (lambda m, x, y: m.pad(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 10, [8]),
    "width of a layer": (lambda m, x, y: y * m.b.out_channels, 8, [8]),
    "widths of layers compared": (lambda m, x, y: x + y if m.b.in_channels == m.b.out_channels else y, 8, []),
    "group count 1": (lambda m, x, y: y if m.b.groups == 1 else x, 8, [8, 8]),
    "only in evaluation": (lambda m, x, y: y if m.training else y * m.gate, 8, [8, 8]),
    "only in training": (lambda m, x, y: y + x if m.training else y, 8, [8]),
    "another layer in evaluation": (lambda m, x, y: y if m.training else F.conv2d(y, m.weight), 8, [8, 8]),
    "a weight's values": (lambda m, x, y: F.conv2d(y, m.weight) / m.weight.abs().mean(), 8, [8]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_numbers_of_channels_stay_right_through_surgery(name: str) -> None:
    function, out, sizes = FOLLOWED[name]
    torch.manual_seed(0)
    graph = ChannelGraph.trace(Body(function, out).double(), images())
    assert sorted(space.size for space in graph.spaces) == sorted(sizes)
    check_surgery(Body(function, out), (images(),), tolerance=1e-8, spaces=bool(sizes))


REFUSED = {
    "reciprocal": (lambda m, x, y: y * (1.0 / y.shape[1]), "number of channels"),
    "negative power": (lambda m, x, y: y * (9 * y.shape[1]) ** -0.5, "number of channels"),
    "literal minus a width": (lambda m, x, y: y * (20 - y.shape[1]), "number of channels"),
    "fan-in of a weight": (lambda m, x, y: F.conv2d(y, m.weight) * m.weight.shape[1] ** -0.5, "number of channels"),
    "all entries": (lambda m, x, y: y * (1.0 / m.b.weight.numel()), "number of channels"),
    "widths compared": (lambda m, x, y: x + y if x.shape[1] == y.shape[1] else y, "control flow"),
    "layer drop": (lambda m, x, y: x if m.training and random.random() < 0.5 else y, "random number"),
    "NumPy's chance": (lambda m, x, y: x if numpy.random.rand() < 0.1 else y, "random number"),
    "torch's chance": (lambda m, x, y: x if torch.rand(()) < 0.01 else y, "random number"),
    "chance only in evaluation": (lambda m, x, y: y if m.training or random.random() < 0.9 else x, "random number"),
    "a counter": (lambda m, x, y: y if m.__dict__.update(n=m.__dict__.get("n", 0) + 1) or m.n % 2 else x, "every time"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_compute_something_else_is_refused_whatever_the_dice_say(name: str) -> None:
    function, reason = REFUSED[name]
    for seed in range(3):
        random.seed(seed), numpy.random.seed(seed), torch.manual_seed(seed)
        states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
        with pytest.raises(MorphError, match=reason):
            ChannelGraph.trace(Body(function).double(), images())
        assert random.getstate() == states[0]
        assert numpy.random.get_state()[1].tolist() == states[1]
        torch.manual_seed(seed)  # the model draws its weights


def test_random_tensors_that_nobody_looks_at_are_no_chance() -> None:
    graph = ChannelGraph.trace(Body(lambda m, x, y: y * torch.rand(1)).double(), images())
    assert len(graph.spaces) == 2


def test_a_number_that_cannot_change_may_be_computed_with() -> None:
    """The channels are those of the network's input, or are used up to a constant bound."""
    for function in (lambda m, x, y: y[:, :8] * (1.0 / y.shape[1]), lambda m, x, y: y * m.gate.shape[0]):
        check_surgery(Body(function), (images(),), tolerance=1e-8, spaces=None)


class Tied(nn.Module):
    """An autoencoder whose decoder uses the encoder's weight."""

    def __init__(self, modules: bool) -> None:
        super().__init__()
        self.stem, self.head, self.modules_ = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), modules
        self.encoder, self.decoder = nn.Conv2d(8, 6, 3, bias=False), nn.ConvTranspose2d(6, 8, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.modules_:
            return self.head(self.decoder(self.encoder(x).relu())).mean((2, 3))
        y = F.conv2d(x, self.encoder.weight).relu()
        return self.head(F.conv_transpose2d(y, self.encoder.weight)).mean((2, 3))


@pytest.mark.parametrize("modules", [True, False])
def test_what_one_weight_makes_and_uses_can_be_pruned_but_not_widened(modules: bool) -> None:
    model = Tied(modules).double()
    graph = check_surgery(model, (images(),), tolerance=1e-8)
    assert sorted(space.name.partition(".")[0] for space in graph.spaces) == ["encoder", "stem"]
    x = (images(),)
    before = outputs(model, x)
    for space in graph.spaces:
        with pytest.raises(MorphError, match="cannot be widened"):
            graph.reindex(space, [*range(space.size), 0])
    for a, b in zip(outputs(model, x), before, strict=True):
        assert torch.equal(a, b)
