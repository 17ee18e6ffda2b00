"""`prune.round_to=auto`: as far down the ladder of widths as that saves something, by given prices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from networks import build, chain, mask, trace

from morphtrain.cost import WidthCost
from morphtrain.cost.widths import layers_of
from morphtrain.morph import ChannelGraph, Space
from morphtrain.prune.knapsack import Cost
from morphtrain.prune.reconfigure import channel_importance, reconfigure
from morphtrain.prune.rounding import Rounding

Widths = Mapping[Space, int]


def kept(graph: ChannelGraph, rounding: Rounding) -> dict[Space, torch.Tensor]:
    importance = channel_importance(graph)
    return rounding.channels_to_keep(graph, importance, {space: found >= 1e-4 for space, found in importance.items()})


def by_width(seconds: Callable[[int], float]) -> Callable[[ChannelGraph], Cost]:
    return lambda graph: lambda widths: sum(seconds(width) for width in widths.values())


CHEAPER = {
    "every channel costs": lambda width: width,
    "four at once": lambda width: -(-width // 4),
    "eight at once": lambda width: -(-width // 8),
    "nothing is won": lambda width: 1,
    "narrower is slower": lambda width: 100 / width,
}


@pytest.mark.parametrize(
    ("cost", "multiple", "wanted"),
    [
        ("every channel costs", 1, 3),
        ("every channel costs", 2, 4),
        ("every channel costs", 4, 4),
        ("four at once", 1, 4),  # the first of those that are as fast
        ("eight at once", 1, 8),
        ("eight at once", 4, 8),
        ("nothing is won", 1, 8),
        ("narrower is slower", 1, 8),
    ],
)
def test_dead_channels_go_as_far_as_that_saves(cost: str, multiple: int, wanted: int) -> None:
    model = chain({5, 6, 7}, {5, 6, 7})  # 8 channels, 3 of them alive
    graph = trace(model)
    keep = kept(graph, Rounding(multiple=multiple, cost_of=by_width(CHEAPER[cost])))
    (space,) = [space for space in keep if space.size == 8]
    assert int(keep[space].sum()) == wanted
    assert keep[space][5:].all()


@pytest.mark.parametrize(
    ("cost", "share", "wanted"),
    [
        ("every channel costs", 0.0, 6),
        ("every channel costs", 0.02, 6),  # none is as weak as that
        ("every channel costs", 0.3, 4),
        ("four at once", 0.0, 8),
        ("four at once", 0.3, 4),
        ("eight at once", 0.9, 8),
    ],
)
def test_weak_live_channels_go_where_that_saves(cost: str, share: float, wanted: int) -> None:
    model = chain(set(range(6)), set(range(6)))
    weak = torch.tensor([1, 4])
    model[0].weight.data[weak] *= 0.1
    model[2].weight.data[:, weak] *= 0.1
    graph = trace(model)
    rounding = Rounding(multiple=2, cost_of=by_width(CHEAPER[cost]), round_down=share)
    keep = kept(graph, rounding)
    (space,) = [space for space in keep if space.size == 8]
    assert int(keep[space].sum()) == wanted
    assert keep[space][[0, 2, 3, 5]].all()
    importance = channel_importance(graph)[space][:6]  # the live ones
    assert (importance[~keep[space][:6]] <= share * importance.median()).all()
    change = reconfigure(graph, rounding=rounding)
    assert change.given_up == max(6 - wanted, 0)
    assert ("2 of them alive" in change.summary()) == (wanted == 4)


def test_rounding_down_needs_a_cost() -> None:
    with pytest.raises(ValueError, match="needs cost_of"):
        Rounding(multiple=4, round_down=0.5)


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_with_a_price_for_every_channel_widths_are_those_rounded_up(shortcut: str, share: float, multiple: int) -> None:
    """Padded shortcuts put residual sums together from parts: the width of the whole is what counts."""
    graph = trace(build(2, width=16, shortcut=shortcut))
    for space in graph.spaces:
        mask(space, torch.arange(round(share * space.size), space.size))
    alive = {space: found >= 1e-4 for space, found in channel_importance(graph).items()}
    keep = kept(graph, Rounding(multiple=multiple, cost_of=lambda graph: WidthCost(graph, "flops")))
    plain = kept(graph, Rounding(multiple=multiple))
    cost = WidthCost(graph, "flops")
    assert all(bool(keep[space][alive[space]].all()) for space in graph.spaces)
    assert cost({s: int(m.sum()) for s, m in keep.items()}) <= cost({s: int(m.sum()) for s, m in plain.items()})
    graph.reindex_spaces({space: mask.nonzero().flatten() for space, mask in keep.items()})
    assert all(axis.length % multiple == 0 for axis in graph.axes if axis.weight is not None and axis.length > 10)


def test_the_price_is_that_of_the_network_whose_dead_blocks_have_gone() -> None:
    graph = trace(build(2, width=16, shortcut="B"))
    inner = next(space for space in graph.spaces if space.name.startswith("stages.0.1"))
    mask(inner, torch.arange(inner.size))
    seen: list[int] = []

    def cost_of(graph: ChannelGraph) -> WidthCost:
        seen.append(len(layers_of(graph)))
        return WidthCost(graph, "flops")

    before = len(layers_of(graph))
    change = reconfigure(graph, rounding=Rounding(multiple=8, cost_of=cost_of))
    assert change.removed_blocks
    assert seen == [before - 2]
