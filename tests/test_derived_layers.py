"""Layers derived from torch's: what keeps torch's forward is that layer, and a norm with an activation is a norm."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import assert_close, check_surgery, mask, outputs
from topologies import images
from torch import nn
from torch.nn import functional as F

from morphtrain.cost import WidthCost, count_macs
from morphtrain.morph import ChannelGraph
from morphtrain.prune.channel_norms import ChannelNorms
from morphtrain.prune.reconfigure import reconfigure


class Plain(nn.Conv2d):
    """torch's convolution under another name."""


class Described(nn.Conv2d):
    def __init__(self, *args: int, **options: object) -> None:
        super().__init__(*args, **options)
        self.note = "mine"

    def extra_repr(self) -> str:
        return self.note


class Doubled(nn.Conv2d):
    """Keeps forward, but not what it calls."""

    def _conv_forward(self, x, weight, bias):
        return 2 * F.conv2d(x, weight, bias, self.stride, self.padding)


class PlainNorm(nn.BatchNorm2d):
    pass


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act or nn.ReLU(inplace=True)

    def forward(self, x):
        torch._assert(x.ndim == 4, "images")
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class Mixing(nn.BatchNorm2d):
    """A norm that is none: what it gives for a channel depends on all of them."""

    def forward(self, x):
        return super().forward(x) if x is None else OwnForward.forward(self, x) * x.mean((1, 2, 3), keepdim=True)


class OnlyInTraining(nn.BatchNorm2d):
    def forward(self, x):
        x = OwnForward.forward(self, x)
        return x if self.training else x + x.mean(1, keepdim=True)


class Net(nn.Module):
    def __init__(self, conv: type = nn.Conv2d, norm: type = nn.BatchNorm2d, last: type | None = None) -> None:
        super().__init__()
        self.a, self.n = conv(3, 8, 3, padding=1, bias=False), norm(8)
        self.b, self.m = conv(8, 6, 3, padding=1, bias=False), norm(6)
        self.c, self.o, self.fc = conv(6, 8, 3, padding=1, bias=False), (last or norm)(8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.n(self.a(x)))
        return self.fc((x + self.o(self.c(F.relu(self.m(self.b(x)))))).mean((2, 3)))


def facts(graph: ChannelGraph) -> tuple[object, ...]:
    norms = ChannelNorms(graph, "gamma_l1")
    slopes = WidthCost(graph, "flops").coefficients(ChannelNorms(graph, "group_lasso").alive(0.0))
    sizes = [space.size for space in graph.spaces]
    return sizes, len(norms.spaces), WidthCost(graph, "flops")(), list(slopes.values()), len(graph.blocks)


@pytest.mark.parametrize("conv", [Plain, Described])
@pytest.mark.parametrize("norm", [PlainNorm, OwnForward, NormAct])
def test_a_derived_layer_is_known_and_costs_as_torchs(conv: type, norm: type) -> None:
    torchs, own = (ChannelGraph.trace(net, images().float()) for net in (Net(), Net(conv, norm)))
    assert facts(own) == facts(torchs)
    assert facts(own)[2] == 2 * count_macs(Net(), (3, *images().shape[2:]))
    check_surgery(Net(conv, norm), (images(),), tolerance=1e-8)


def test_a_layer_that_changes_what_its_forward_calls_is_another_layer() -> None:
    check_surgery(Net(Doubled), (images(),), tolerance=1e-8)
    assert WidthCost(ChannelGraph.trace(Net(Doubled).double(), images()), "flops")() < count_macs(Net(), (3, 8, 8))


@pytest.mark.parametrize("norm", [Mixing, OnlyInTraining])
def test_a_norm_that_mixes_channels_in_either_mode_is_no_norm(norm: type) -> None:
    model = Net(norm=norm)
    graph = check_surgery(model, (images(),), tolerance=1e-8, spaces=None)
    assert not ChannelNorms(graph, "gamma_l1").spaces


@pytest.mark.parametrize("act", [nn.Identity, nn.ReLU, nn.Sigmoid])
def test_a_dead_branch_that_ends_in_a_norm_with_an_activation_is_removed(act: type) -> None:
    model = Net(norm=NormAct, last=lambda channels: NormAct(channels, act())).double()
    nn.init.normal_(model.o.bias), nn.init.normal_(model.o.running_mean)
    tracked = copy.deepcopy(dict(model.named_buffers()))
    graph = ChannelGraph.trace(model, images())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, tracked[name]), f"tracing changed {name}"
    mask(graph.space("b"), torch.arange(6))
    before = outputs(model)
    assert reconfigure(graph, threshold=1e-4).removed_blocks == ["c"]
    assert_close(outputs(model), before, 1e-12)
