"""The knapsack over widths: always within the budget, and against all that could be chosen, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from networks import build, trace
from test_costs import own_term
from topologies import TOPOLOGIES
from torch import nn

from morphtrain.cost import WidthCost
from morphtrain.morph import ChannelGraph, Space
from morphtrain.prune.knapsack import within
from morphtrain.prune.reconfigure import channel_importance

Widths = dict[Space, int]

WORST, MOSTLY = 1.25, 0.8  # times the least that can be lost, in all cases; the share of cases where it is the least


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def chain() -> nn.Module:
    return nn.Sequential(conv(3, 12), conv(12, 8), conv(8, 13), nn.Flatten(), nn.Linear(13 * 64, 2))


class Sum(nn.Module):
    """A residual sum whose shortcut is padded: one side of two spaces."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.last, self.head = conv(3, 8), conv(8, 10), conv(10, 14), nn.Linear(14, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        padded = nn.functional.pad(x, (0, 0, 0, 0, 3, 3), "constant", 0)
        return self.head((self.last(self.inner(x).relu()) + padded).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {"chain": chain, "Sum": Sum}
NETS |= {name: TOPOLOGIES[name][0] for name in ("Inception", "DenseBlock", "Chunked", "Grouped")}
CASES = [(name, multiple) for name in NETS for multiple in (1, 2, 4)]


def graph_of(name: str) -> ChannelGraph:
    return ChannelGraph.trace(NETS[name]().float(), torch.zeros(1, 3, 8, 8))


def drawn(graph: ChannelGraph, seed: int) -> dict[Space, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {space: torch.rand(space.size, generator=generator) ** 2 for space in graph.spaces}


def is_on_ladder(graph: ChannelGraph, widths: Mapping[Space, int], multiple: int) -> bool:
    for axis in graph.axes:
        if axis.weight is not None:
            now = [widths[s.space] if s.space else s.fixed_size for s in axis.segments]
            full = [s.space.size if s.space else s.fixed_size for s in axis.segments]
            if sum(now) % multiple and now != full:
                return False
    return True


def all_widths(graph: ChannelGraph, multiple: int) -> Iterator[Widths]:
    for sizes in itertools.product(*(range(1, space.size + 1) for space in graph.spaces)):
        widths = dict(zip(graph.spaces, sizes, strict=True))
        if is_on_ladder(graph, widths, multiple):
            yield widths


def lost(importance: Mapping[Space, torch.Tensor], widths: Mapping[Space, int]) -> float:
    """Without the least important channels."""
    return sum(float(r.sort().values[: len(r) - widths[space]].sum()) for space, r in importance.items())


def widths_of(keep: Mapping[Space, torch.Tensor]) -> Widths:
    return {space: int(mask.sum()) for space, mask in keep.items()}


def kinked(graph: ChannelGraph) -> Callable[[Mapping[Space, int]], float]:
    """A device that works on four channels at once."""
    cost = WidthCost(graph, "flops")
    return lambda widths: cost({space: -(-width // 4) * 4 for space, width in widths.items()})


COSTS = {
    "flops": lambda graph: WidthCost(graph, "flops"),
    "latency": lambda graph: WidthCost(graph, "latency", term_of=own_term),
    "kinked": kinked,
}


@pytest.mark.parametrize(("name", "multiple"), CASES)
def test_hardly_more_is_lost_than_has_to_be(name: str, multiple: int) -> None:
    graph = graph_of(name)
    possible = list(all_widths(graph, multiple))
    for kind, make in COSTS.items():
        cost = make(graph)
        costs = [cost(widths) for widths in possible]
        ratios = []
        for seed in range(3):
            importance = drawn(graph, seed)
            losses = [lost(importance, widths) for widths in possible]
            for share in (0.3, 0.5, 0.7, 0.9):
                budget = share * cost({space: space.size for space in graph.spaces})
                least = min((loss for loss, spent in zip(losses, costs, strict=True) if spent <= budget), default=None)
                if least is None:
                    with pytest.raises(ValueError, match=f"budget={budget:.6g}: the least that was found is"):
                        within(graph, importance, cost, budget, multiple=multiple)
                    continue
                widths = widths_of(within(graph, importance, cost, budget, multiple=multiple))
                assert cost(widths) <= budget
                assert is_on_ladder(graph, widths, multiple)
                ratios.append(lost(importance, widths) / least)
        assert not ratios or min(ratios) > 1 - 1e-6, "less than the least: this test or the search is wrong"
        assert max(ratios, default=1.0) <= WORST, kind
        assert sum(ratio < 1 + 1e-6 for ratio in ratios) >= MOSTLY * len(ratios), kind


@pytest.mark.parametrize("name", ["chain", "Sum", "Inception"])
def test_a_larger_budget_loses_no_more(name: str) -> None:
    graph = graph_of(name)
    cost = WidthCost(graph, "flops")
    for seed in range(5):
        importance = drawn(graph, seed)
        losses = []
        for share in torch.linspace(0.2, 1.0, 17).tolist():
            losses.append(lost(importance, widths_of(within(graph, importance, cost, share * cost()))))
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] == 0.0


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_a_network_is_cut_to_the_budget_on_the_ladder(shortcut: str, multiple: int) -> None:
    graph = trace(build(3, width=16, shortcut=shortcut))
    cost, importance = WidthCost(graph, "flops"), channel_importance(graph)
    budget = 0.4 * cost()
    keep = within(graph, importance, cost, budget, multiple=multiple, min_channels=2)
    assert list(keep) == graph.spaces
    for space, mask in keep.items():
        assert mask.shape == (space.size,)
        assert mask.sum() >= min(2, space.size)
        assert mask.all() or importance[space][~mask].max() <= importance[space][mask].min(), "the least important go"
    assert is_on_ladder(graph, widths_of(keep), multiple)
    narrow = cost(widths_of(keep))
    assert 0.9 * budget < narrow <= budget
    graph.reindex_spaces({space: mask.nonzero().flatten() for space, mask in keep.items()})
    assert cost() == narrow
    lengths = [axis.length for axis in graph.axes if axis.weight is not None]
    assert all(length % multiple == 0 for length in lengths if length not in (3, 10))


def test_what_costs_nothing_to_lose_goes_and_what_must_stay_stays() -> None:
    graph = graph_of("chain")
    cost = WidthCost(graph, "flops")
    first, second, third = graph.spaces
    importance = drawn(graph, 0)
    importance[first][[1, 5, 7]] = 0.0
    keep = within(graph, importance, cost, cost())
    assert [mask.sum() for mask in keep.values()] == [9, 8, 13]
    assert not keep[first][[1, 5, 7]].any()
    importance[first][:] = torch.inf
    keep = within(graph, {first: importance[first], second: importance[second]}, cost, 0.6 * cost())
    assert keep[first].all()
    assert keep[third].all(), "it was not named"
    assert not keep[second].all()
    with pytest.raises(ValueError, match=r"budget=1: the least that was found is .* \(multiple=1, min_channels=3\)"):
        within(graph, drawn(graph, 0), cost, 1.0, min_channels=3)


def test_a_width_that_saves_nothing_is_passed_over() -> None:
    """On a device of 16 channels at once, 8 cost as much as 16: half a step down is no step."""
    graph = trace(build(1, width=32, shortcut="B"))
    flops = WidthCost(graph, "flops")

    def cost(widths: Mapping[Space, int]) -> float:
        return flops({space: -(-width // 16) * 16 for space, width in widths.items()})

    whole = cost({space: space.size for space in graph.spaces})
    keep = within(graph, channel_importance(graph), cost, 0.5 * whole, multiple=8)
    widths = widths_of(keep)
    assert cost(widths) <= 0.5 * whole
    assert all(width % 16 == 0 for width in widths.values()), "8 more for the same"


def test_a_large_network_takes_few_questions() -> None:
    """Each question adds up some 50 layers, in about 0.1 ms: a second allows for several thousand."""
    from torchvision.models import resnet50

    with torch.device("meta"):
        model = resnet50()
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 64, 64, device="meta"))
    flops, asked = WidthCost(graph, "flops"), itertools.count()

    def cost(widths: Mapping[Space, int]) -> float:
        next(asked)
        return flops(widths)

    keep = within(graph, drawn(graph, 0), cost, 0.5 * flops(), multiple=8)
    assert flops(widths_of(keep)) <= 0.5 * flops()
    assert next(asked) < 6000


def test_nonsense_is_refused() -> None:
    graph = graph_of("chain")
    importance = drawn(graph, 0)
    for options in ({"multiple": 0}, {"min_channels": 0}):
        with pytest.raises(ValueError, match="must be 1 or more"):
            within(graph, importance, WidthCost(graph, "flops"), 1.0, **options)
    importance[graph.spaces[0]][2] = torch.nan
    with pytest.raises(ValueError, match=f"importance of '{graph.spaces[0].name}': not a number"):
        within(graph, importance, WidthCost(graph, "flops"), 1.0)


def test_layers_that_share_spaces_move_together_where_none_can_alone() -> None:
    """A concatenation of three spaces of 12: on a ladder of 8 none of its widths can change alone."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv(3, 12)
            self.layers = nn.ModuleList([conv(12, 12), conv(24, 12)])
            self.head = nn.Linear(36, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            for layer in self.layers:
                x = torch.cat([x, layer(x).relu()], 1)
            return self.head(x.mean((2, 3)))

    graph = ChannelGraph.trace(Dense(), torch.zeros(1, 3, 8, 8))
    cost = WidthCost(graph, "flops")
    for seed in range(10):
        importance = drawn(graph, seed)
        for share in (0.5, 0.7):
            widths = widths_of(within(graph, importance, cost, share * cost(), multiple=8))
            assert cost(widths) <= share * cost()
            assert is_on_ladder(graph, widths, 8)
            possible = [w for w in all_widths(graph, 8) if cost(w) <= share * cost()]
            assert lost(importance, widths) <= WORST * min(lost(importance, w) for w in possible)
