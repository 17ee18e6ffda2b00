"""The calls of layers that a mode sees and may replace."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from morphtrain.layer_calls import LayerCalls


class Scaled(LayerCalls):
    """Layers give `factor` times as much; remembers the shapes of the weights."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.shapes: list[tuple[int, ...]] = []

    def call(self, layer, x, weight, bias, *rest, **keywords):
        self.shapes.append(tuple(weight.shape))
        return self.factor * layer(x, weight, bias, *rest, **keywords)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.head = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 5, 2), nn.Linear(5, 6)
        self.free = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(self.conv(x), weight=self.free, padding=1)
        return self.head(self.up(x).mean((2, 3)))


def test_all_layers_are_seen_also_in_code_and_only_inside():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 3, 6, 6)
    with Scaled(1.0) as seen:
        same = net(x)
    assert seen.shapes == [(4, 3, 3, 3), (4, 4, 1, 1), (4, 5, 2, 2), (6, 5)]
    torch.testing.assert_close(same, net(x), rtol=0, atol=0)
    assert len(seen.shapes) == 4


def test_modes_nest_and_the_backward_pass_sees_none():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2, bias=False), torch.randn(4, 3)
    with Scaled(2.0) as outer, Scaled(3.0) as inner:
        out = layer(x)
    torch.testing.assert_close(out, 6 * layer(x))
    out.sum().backward()
    assert outer.shapes == inner.shapes == [(2, 3)]
    torch.testing.assert_close(layer.weight.grad, 6 * x.sum(0).expand(2, 3))
