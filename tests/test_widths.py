"""The width probe: which cuts it chooses by given clocks, and what it measures."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from networks import INPUT, build, chain, mask, trace
from torch import nn

from morphtrain.morph import ChannelGraph, Space
from morphtrain.morph.formats import format_of
from morphtrain.prune.reconfigure import channel_importance, reconfigure
from morphtrain.prune.rounding import NO_ROUNDING, Rounding
from morphtrain.prune.width_probe import LAST_ROUNDS, WidthProbe, cut, widths_of

Clock = Callable[[int, int], float]  # of the inputs and outputs of a convolution


def kept(graph: ChannelGraph, rounding: Rounding) -> dict[Space, torch.Tensor]:
    importance = channel_importance(graph)
    return rounding.channels_to_keep(graph, importance, {space: found >= 1e-4 for space, found in importance.items()})


class ClockedProbe(WidthProbe):
    """A probe whose clock is a function of the network."""

    def __init__(self, seconds: Callable[[nn.Module], float]) -> None:
        super().__init__(1)
        self.seconds = seconds

    def timed(self, networks, inputs, rounds) -> list[float]:
        return [self.seconds(network) for network in networks]


def by_convolution(seconds: Clock) -> Callable[[nn.Module], float]:
    def total(network: nn.Module) -> float:
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        return sum(float(seconds(module.in_channels, module.out_channels)) for module in convolutions)

    return total


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        (lambda a, b: a + b, 3),  # every channel costs: cut as far as possible
        (lambda a, b: -(-a // 8) + -(-b // 8), 3),  # a plateau: the smallest of the fastest
        (lambda a, b: (a % 4 > 0) + (b % 4 > 0) + 0.01, 4),  # multiples of 4 are faster
        (lambda a, b: 100 / (a * b), 8),  # nothing is won: stay
    ],
)
def test_a_space_keeps_the_width_that_is_fastest(seconds: Clock, wanted: int) -> None:
    model = chain({5, 6, 7}, {5, 6, 7})  # 8 channels, 3 of them alive
    keep = kept(trace(model), Rounding(probe=ClockedProbe(by_convolution(seconds))))
    (space,) = [space for space in keep if space.size == 8]
    assert int(keep[space].sum()) == wanted
    assert keep[space][5:].all()


def vectors(a: int, b: int) -> float:
    """A device that works on four channels at once."""
    return -(-a // 4) * -(-b // 4)


@pytest.mark.parametrize(
    ("seconds", "share", "wanted"),
    [
        (vectors, 0.0, 6),
        (vectors, 0.02, 6),  # none is as weak as that
        (vectors, 0.3, 4),
        (vectors, 0.9, 4),
        (lambda a, b: -(-a // 8) * -(-b // 8), 0.9, 6),  # nothing is won by it
        (lambda a, b: 100 / (a * b), 0.9, 8),
    ],
)
def test_weak_live_channels_go_where_that_is_faster(seconds: Clock, share: float, wanted: int) -> None:
    model = chain(set(range(6)), set(range(6)))
    weak = torch.tensor([1, 4])
    model[0].weight.data[weak] *= 0.1
    model[2].weight.data[:, weak] *= 0.1
    graph, probe = trace(model), ClockedProbe(by_convolution(seconds))
    rounding = Rounding(probe=probe, round_down=share)
    keep = kept(graph, rounding)
    (space,) = [space for space in keep if space.size == 8]
    assert int(keep[space].sum()) == wanted
    assert keep[space][[0, 2, 3, 5]].all()
    assert wanted == 8 or not keep[space][[6, 7]].any()
    importance = channel_importance(graph)[space][:6]  # the live ones
    assert (importance[~keep[space][:6]] <= share * importance.median()).all()
    change = reconfigure(graph, rounding=rounding)
    assert change.given_up == max(6 - wanted, 0)
    assert ("2 of them alive" in change.summary()) == (wanted == 4)
    if share:
        with pytest.raises(ValueError, match="needs a WidthProbe"):
            reconfigure(graph, rounding=Rounding(multiple=4, round_down=share))


SHAPES_OF_TIME = {
    "vectors of 16": lambda a, b: 16 * (-(-a // 16) * b + -(-b // 16) * a),
    "whole multiples of 8": lambda a, b: 100 * ((a % 8 > 0) + (b % 8 > 0)) + a + b,
    "whole multiples of 4, smaller is faster": lambda a, b: (1 + (a % 4 > 0) + (b % 4 > 0)) * a * b,
}


def partly_dead(share: float) -> ChannelGraph:
    """A ResNet of 16, 32 and 64 channels, of which `share` are alive everywhere."""
    graph = trace(build(2, width=16))
    for space in graph.spaces:
        mask(space, torch.arange(round(share * space.size), space.size))
    return graph


@pytest.mark.parametrize("shape", SHAPES_OF_TIME)
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_what_the_probe_chooses_is_as_fast_as_any_rounding(shape: str, share: float) -> None:
    """Padded shortcuts put residual sums together from parts: the width of the whole is what counts."""
    graph, seconds = partly_dead(share), by_convolution(SHAPES_OF_TIME[shape])

    def total(rounding: Rounding) -> float:
        return seconds(cut(graph, kept(graph, rounding)))

    chosen = total(Rounding(probe=ClockedProbe(seconds)))
    assert chosen <= total(NO_ROUNDING)
    assert chosen <= 1.03 / 0.97 * min(total(Rounding(multiple=multiple)) for multiple in (4, 8, 16))

    class Slowing(ClockedProbe):
        """On a machine that becomes slower with every question."""

        speed = 1.0

        def timed(self, networks, inputs, rounds) -> list[float]:
            self.speed *= 1.3
            return [self.speed * found for found in super().timed(networks, inputs, rounds)]

    steady, slowing = (kept(graph, Rounding(probe=probe(seconds), round_down=0.3)) for probe in (ClockedProbe, Slowing))
    assert all(torch.equal(steady[space], slowing[space]) for space in graph.spaces)


def test_each_resolution_has_the_rounding_that_suits_it() -> None:
    """Here the layers at the full resolution like multiples of 16, and all others every channel less."""
    graph = partly_dead(0.55)

    def seconds(network: nn.Module) -> float:
        convolutions = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.Conv2d)]
        full = [module.out_channels for path, module in convolutions if path.startswith(("stem", "stages.0"))]
        rest = [module.out_channels for path, module in convolutions if path.startswith(("stages.1", "stages.2"))]
        return 100.0 * sum(outputs % 16 > 0 for outputs in full) + sum(rest)

    keep = kept(graph, Rounding(probe=ClockedProbe(seconds)))
    for space in graph.spaces:
        full = space.name.startswith(("stem", "stages.0"))
        assert int(keep[space].sum()) == (16 if full else round(0.55 * space.size)), space.name


@pytest.mark.parametrize("seed", range(8))
def test_a_choice_that_only_noise_supports_is_not_taken(seed: int) -> None:
    """Among many equal times the shortest was measured too short; timed again, it is like the others."""
    draw = random.Random(seed)

    class Noisy(WidthProbe):
        def timed(self, networks, inputs, rounds) -> list[float]:
            return [1.0 if rounds == LAST_ROUNDS else draw.random() for _ in networks]

    model = chain({5, 6, 7}, {5, 6, 7})
    keep = kept(trace(model), Rounding(probe=Noisy(1)))
    (space,) = [space for space in keep if space.size == 8]
    assert int(keep[space].sum()) == 3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_training_steps_of_copies_are_timed(layout: torch.memory_format) -> None:
    """In the format and type of the network; neither it nor the random numbers change."""
    graph = partly_dead(0.55)
    graph.model.to(memory_format=layout).eval()
    before, state = copy.deepcopy(graph.model.state_dict()), torch.random.get_rng_state()
    seen: list[tuple[nn.Module, torch.Tensor]] = []

    class Watched(WidthProbe):
        def _step(self, network, inputs, device) -> float:
            spent = super()._step(network, inputs, device)
            seen.append((network, *inputs))
            return spent

    keep = kept(graph, Rounding(probe=Watched(3)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not graph.model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.model.state_dict().items())
    assert widths_of(keep) != widths_of({space: torch.ones(space.size) for space in graph.spaces})
    assert len({id(network) for network, _ in seen}) > 5
    for network, images in seen:
        assert network.training
        assert (images.shape, images.dtype) == ((3, *INPUT.shape[1:]), INPUT.dtype)
        assert format_of(images) is format_of(network.stem[0].weight) is layout
        assert all(parameter.grad is None for parameter in network.parameters())


def test_a_network_with_integers_in_and_several_outputs_is_timed() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.hidden = nn.Embedding(10, 8), nn.Linear(8, 8)
            self.left, self.right = nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, tokens: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = self.hidden(self.embed(tokens)).relu() * scale
            return {"left": self.left(hidden), "right": self.right(hidden), "tokens": tokens}

    model = Pair()
    with torch.no_grad():
        for tensor in (model.hidden.weight, model.hidden.bias):
            tensor[5:] = 0
        model.left.weight[:, 5:] = model.right.weight[:, 5:] = 0
    graph = ChannelGraph.trace(model, (torch.zeros(1, dtype=torch.long), torch.ones(1, 1)))
    reconfigure(graph, rounding=Rounding(probe=WidthProbe(4)))
    assert model.hidden.out_features in (5, 8)
