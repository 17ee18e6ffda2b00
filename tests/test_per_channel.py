"""A layer of one's own that no trace can look into declares that it treats each channel by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import morphtrain
from morphtrain.morph import ChannelGraph, MorphError

EXAMPLE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Kernel(torch.autograd.Function):
    """x * sigmoid(slope x), as a trace cannot see it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, slope)
        return x * (slope * x).sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, slope = ctx.saved_tensors
        gate = (slope * x).sigmoid()
        return gradient * (gate + slope * x * gate * (1 - gate)), gradient * x * x * gate * (1 - gate)


class Swish(nn.Module):
    per_channel = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.slope = nn.Parameter(torch.ones(channels))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == self.channels
        if float(x.shape[0]) > 1e9:  # control flow
            return x
        return Kernel.apply(x, self.slope.view(-1, 1, 1).expand(x.shape[1:]))


class Undeclared(Swish):
    per_channel = False


class Reversing(Swish):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flip(1))


class Normalising(Swish):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / (1 + x.mean(1, keepdim=True).abs())


class Doubling(Swish):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x], 1)


class Holding(Swish):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.table = nn.Parameter(torch.ones(channels + 1, 2))


class Net(nn.Module):
    def __init__(self, layer: type[Swish] = Swish, wide: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, wide, 3, padding=1), nn.BatchNorm2d(wide), layer(wide))
        width = wide * (1 + (layer is Doubling))
        self.body = nn.Sequential(nn.Conv2d(width, 5, 3, padding=1), layer(5), nn.Flatten(), nn.Linear(320, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.stem(x))


def random_net() -> Net:
    model = Net()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.rand_like(tensor))
    return model


def test_the_sliced_network_is_the_masked_one() -> None:
    model = random_net().eval()
    graph = ChannelGraph.trace(model, EXAMPLE[:1])
    assert sorted(space.size for space in graph.spaces) == [5, 6]
    masked = {}
    for path, kept in (("stem.2", [0, 2, 5]), ("body.1", [1, 4])):
        mask = torch.zeros(model.get_submodule(path).channels)
        mask[kept] = 1
        masked[path] = model.get_submodule(path).register_forward_hook(lambda m, a, out, k=mask: out * k.view(-1, 1, 1))
    wanted = model(EXAMPLE)
    for handle in masked.values():
        handle.remove()
    graph.reindex_spaces({space: [0, 2, 5] if space.size == 6 else [1, 4] for space in graph.spaces})
    assert [model.stem[2].channels, len(model.stem[2].slope), model.body[1].channels] == [3, 3, 2]
    torch.testing.assert_close(model(EXAMPLE), wanted, rtol=1e-5, atol=1e-5)
    model.train()(EXAMPLE).sum().backward()
    assert model.stem[2].slope.grad.shape == (3,)


def test_it_comes_back_from_a_file(tmp_path: Path) -> None:
    model = random_net()
    graph = ChannelGraph.trace(model, EXAMPLE[:1])
    graph.reindex_spaces({space: range(0, space.size, 2) for space in graph.spaces})
    morphtrain.save(model, tmp_path / "net.pt")
    assert torch.equal(morphtrain.load(tmp_path / "net.pt", Net())(EXAMPLE), model.eval()(EXAMPLE))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Undeclared, "control flow"),
        (Reversing, "Reversing, which declares per_channel, but computes something else with every second channel"),
        (Normalising, "Normalising, .* computes something else with every second channel alone in stem"),
        (Doubling, "Doubling, which declares per_channel, but changes the number of channels in stem"),
        (Holding, "Holding, .* but whose table does not hold its 6 channels in dimension 0 in stem"),
    ],
)
def test_a_declaration_that_does_not_hold_is_refused(layer: type[Swish], reason: str) -> None:
    model = Net(layer)
    before = torch.get_rng_state()
    with pytest.raises(MorphError, match=reason):
        ChannelGraph.trace(model, EXAMPLE[:1])
    assert torch.equal(torch.get_rng_state(), before)
