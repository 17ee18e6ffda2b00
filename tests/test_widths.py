"""The width probe: which widths it chooses by given clocks, and what it measures."""

from __future__ import annotations

import json
import random

import pytest
import torch
from networks import INPUT, build, chain, trace
from torch import nn

from morphtrain.morph import ChannelGraph, Space
from morphtrain.prune.reconfigure import channel_strengths, channels_to_keep, reconfigure
from morphtrain.prune.widths import WidthProbe, timed_places


def kept(graph: ChannelGraph, round_to: int | WidthProbe, round_down: float = 0.0) -> dict[Space, torch.Tensor]:
    return channels_to_keep(graph, channel_strengths(graph), 1e-4, 1, round_to, round_down)


class TimesByWidth(WidthProbe):
    """A probe whose clock is a function of the layer."""

    def __init__(self, seconds) -> None:
        super().__init__(torch.device("cpu"), 1)
        self.function = seconds

    def timed(self, layers) -> dict:
        return {layer: self.function(layer) for layer in layers}


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        (lambda layer: layer.inputs + layer.outputs, 3),  # every channel costs: cut as far as possible
        (lambda layer: -(-layer.inputs // 8) + -(-layer.outputs // 8), 3),  # a plateau: the smallest of the fastest
        (lambda layer: (layer.inputs % 4 > 0) + (layer.outputs % 4 > 0) + 0.01, 4),  # multiples of 4 are faster
        (lambda layer: 100 / (layer.inputs * layer.outputs), 8),  # nothing is won: stay
    ],
)
def test_a_space_keeps_the_width_that_is_fastest(seconds, wanted: int) -> None:
    model = chain({5, 6, 7}, {5, 6, 7})  # 8 channels, 3 of them alive
    keep = kept(trace(model), TimesByWidth(seconds))
    (space,) = [space for space in keep if space.size == 8]
    assert int(keep[space].sum()) == wanted
    assert keep[space][5:].all()


def vectors(layer) -> float:
    """A device that works on four channels at once."""
    return float(-(-layer.inputs // 4) * -(-layer.outputs // 4))


@pytest.mark.parametrize(
    ("seconds", "share", "wanted"),
    [
        (vectors, 0.0, 6),
        (vectors, 0.001, 6),  # more than that would go
        (vectors, 0.1, 4),
        (vectors, 0.9, 4),  # where a MAC takes longer, it does not go
        (lambda layer: layer.macs, 0.9, 6),  # nor where it takes as long
        (lambda layer: layer.macs + 1.0, 0.9, 6),
    ],
)
def test_weak_live_channels_go_where_that_makes_a_mac_cheaper(seconds, share: float, wanted: int) -> None:
    model = chain(set(range(6)), set(range(6)))
    weak = torch.tensor([1, 4])
    model[0].weight.data[weak] *= 0.1
    model[2].weight.data[:, weak] *= 0.1
    graph = trace(model)
    keep = kept(graph, TimesByWidth(seconds), share)
    (space,) = [space for space in keep if space.size == 8]
    assert int(keep[space].sum()) == wanted
    assert keep[space][[0, 2, 3, 5]].all() and not keep[space][[6, 7]].any()
    squares = channel_strengths(graph)[space].square()
    assert squares[~keep[space]].sum() <= (share + 1e-9) * squares.sum()
    change = reconfigure(graph, round_to=TimesByWidth(seconds), round_down=share)
    assert change.given_up == 6 - wanted
    assert ("2 of them alive" in change.summary()) == (wanted == 4)
    if share:
        with pytest.raises(ValueError, match="needs a WidthProbe"):
            reconfigure(graph, round_to=4, round_down=share)


SHAPES_OF_TIME = {
    "vectors of 16": lambda a, b: 16 * (-(-a // 16) * b + -(-b // 16) * a),
    "whole multiples of 8": lambda a, b: 100 * ((a % 8 > 0) + (b % 8 > 0)) + a + b,
    "whole multiples of 4, smaller is faster": lambda a, b: (1 + (a % 4 > 0) + (b % 4 > 0)) * a * b,
}


@pytest.mark.parametrize("shape", SHAPES_OF_TIME)
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_what_the_probe_chooses_is_as_fast_as_any_rounding(shape: str, share: float) -> None:
    """Padded shortcuts put residual sums together from parts: the width of the whole is what counts."""

    def seconds(layer) -> float:
        return float(SHAPES_OF_TIME[shape](layer.inputs, layer.outputs))

    model = build(2, width=16)
    graph = trace(model)
    for space in graph.spaces:
        dead = torch.arange(round(share * space.size), space.size)
        for slot in space.slots:
            if slot.has_weights:
                slot.axis.weight.data.index_fill_(slot.axis.dim, slot.start + dead, 0.0)
    probe = TimesByWidth(seconds)

    def total(round_to) -> float:
        keep = kept(graph, round_to)
        widths = {space: int(kept.sum()) for space, kept in keep.items()}
        return sum(seconds(place.at(widths, "cpu", 1)) for place in timed_places(graph))

    assert total(probe) <= 1.03 * min(total(multiple) for multiple in (1, 4, 8, 16, 32))

    class Slowing(TimesByWidth):
        """Of a machine that becomes slower with every question."""

        speed = 1.0

        def timed(self, layers) -> dict:
            self.speed *= 1.3
            return {layer: self.speed * found for layer, found in super().timed(layers).items()}

    steady, slowing = kept(graph, TimesByWidth(seconds), 0.3), kept(graph, Slowing(seconds), 0.3)
    assert all(torch.equal(steady[space], slowing[space]) for space in graph.spaces)


def test_the_probe_times_every_layer_once_and_remembers() -> None:
    probe = WidthProbe(torch.device("cpu"), 2)
    model = build(1, width=16, shortcut="B").float()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data[::3] = 0.0
            module.weight.data[:, ::3] = 0.0
    graph = ChannelGraph.trace(model, INPUT[:1].float())
    state = torch.random.get_rng_state()
    keep = kept(graph, probe)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(seconds > 0 for seconds in probe.seconds.values())
    for layer in probe.seconds:
        shape = layer.build()(layer.input()).shape
        assert layer.outputs in shape
    other = WidthProbe(torch.device("cpu"), 2)
    other.load_state_dict(json.loads(json.dumps(probe.state_dict())))
    assert (other.seconds, other.again) == (probe.seconds, probe.again)
    again = kept(graph, other)
    assert all(torch.equal(keep[space], again[space]) for space in graph.spaces)
    assert (other.seconds, other.again) == (probe.seconds, probe.again)


@pytest.mark.parametrize("seed", range(8))
def test_a_choice_that_only_noise_speaks_for_is_not_taken(seed: int) -> None:
    """Among many equal times the shortest is one that was measured too short: timed once more, it is as the others."""
    draw = random.Random(seed)

    class Noisy(WidthProbe):
        def timed(self, layers) -> dict:
            return {
                layer: 1.0 if self.seconds and set(layers) <= set(self.seconds) else draw.random() for layer in layers
            }

    model = chain({5, 6, 7}, {5, 6, 7})
    keep = kept(trace(model), Noisy(torch.device("cpu"), 1))
    (space,) = [space for space in keep if space.size == 8]
    assert int(keep[space].sum()) == 3
