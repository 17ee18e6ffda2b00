"""The cost by widths against costs counted on networks that really have them, and the regulariser built on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import INPUT, SHAPES, build, random_keep, trace
from test_zoo import SMALL, image_size, network
from topologies import TOPOLOGIES
from torch import nn

from morphtrain.cost import WidthCost, count_macs
from morphtrain.cost.widths import Layer, Term
from morphtrain.morph import ChannelGraph, Space

COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
KINDS = ("flops", "model_size", "latency")


def own_term(layer: Layer) -> Term:
    """A price by what a layer works on, as a measurement would give it; every part counts."""
    inputs, outputs = layer.positions()
    return Term(2.0 * outputs, 3.0 * inputs, 5.0, 7.0)


def cost_of(graph: ChannelGraph, kind: Any) -> WidthCost:
    return WidthCost(graph, kind, term_of=own_term if kind == "latency" else None)


def called_layers(model: nn.Module, x: torch.Tensor) -> list[tuple[Any, int, int]]:
    """Every call of a convolution or linear layer on a sample: the layer, and how much goes in and comes out."""
    found: list[tuple[Any, int, int]] = []
    handles = [
        m.register_forward_hook(lambda m, inputs, output: found.append((m, inputs[0].numel(), output.numel())))
        for m in model.modules()
        if isinstance(m, COUNTED)
    ]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def count_weights(model: nn.Module, x: torch.Tensor) -> int:
    return sum({id(m.weight): m.weight.numel() for m, _, _ in called_layers(model, x)}.values())


def count_seconds(model: nn.Module, x: torch.Tensor) -> float:
    """What `own_term` says, call by call."""
    total = 0.0
    for module, inputs, outputs in called_layers(model, x):
        rows, columns = module.weight.shape[:2]
        linear = isinstance(module, nn.Linear)
        into, out = (module.in_features, module.out_features) if linear else (module.in_channels, module.out_channels)
        total += 2.0 * outputs / out * rows * columns + 3.0 * inputs / into * rows + 5.0 * columns + 7.0
    return total


def check_counts(graph: ChannelGraph, model: nn.Module, x: torch.Tensor) -> None:
    assert WidthCost(graph, "flops")() == 2 * count_macs(model, x.shape[1:])
    assert WidthCost(graph, "model_size")() == count_weights(model, x)
    assert cost_of(graph, "latency")() == pytest.approx(count_seconds(model, x), rel=1e-12)


def check_widths(model: nn.Module, x: torch.Tensor) -> None:
    """Counts and costs agree before the widths change, foresee the change, and agree after it."""
    graph = ChannelGraph.trace(model, x)
    check_counts(graph, model, x)
    indices = {space: random_keep(space.size) for space in graph.spaces}
    costs = [WidthCost(graph, "flops"), WidthCost(graph, "model_size")]
    foreseen = [cost({space: len(index) for space, index in indices.items()}) for cost in costs]
    graph.reindex_spaces(indices)
    check_counts(graph, model, x)
    assert [cost() for cost in costs] == foreseen
    if not any(space.is_ambiguous for space in graph.spaces):
        check_counts(ChannelGraph.trace(model, x), model, x)


@pytest.mark.parametrize("name", SMALL)
def test_counts_of_torchvision(name: str) -> None:
    check_widths(network(name), torch.randn(1, 3, image_size(name), image_size(name)))


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_of_resnets(shape: str) -> None:
    check_widths(build(2, width=8, **SHAPES[shape]), INPUT[:1])


# Functional layers are not modules and appear in neither count; `count_macs` takes one input, not two.
@pytest.mark.parametrize("name", [name for name in TOPOLOGIES if name not in ("Functional", "SeveralInputs")])
def test_counts_of_every_topology(name: str) -> None:
    model = TOPOLOGIES[name][0]().double()
    check_widths(model, torch.randn(1, 3, 8, 8, dtype=torch.double))


NETS = {name: TOPOLOGIES[name][0] for name in ("DenseBlock", "Grouped", "Depthwise", "Flattened", "Transposed")}
NETS["ResNet"] = lambda: build(1, width=8, shortcut="A").float()


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(NETS)), data=st.data())
def test_the_cost_is_that_of_the_network_with_these_widths(name: str, data: st.DataObject) -> None:
    model, x = NETS[name](), torch.zeros(1, 3, 8, 8)
    graph = ChannelGraph.trace(model, x)
    chosen = data.draw(st.lists(st.sampled_from(range(len(graph.spaces))), unique=True, min_size=1))
    widths = {graph.spaces[i]: data.draw(st.integers(1, 2 * graph.spaces[i].size)) for i in chosen}
    costs = {kind: cost_of(graph, kind) for kind in KINDS}
    foreseen = {kind: cost(widths) for kind, cost in costs.items()}
    graph.reindex_spaces({space: [i % space.size for i in range(n)] for space, n in widths.items()})
    assert foreseen["flops"] == 2 * count_macs(model, x.shape[1:])
    assert foreseen["model_size"] == count_weights(model, x)
    assert foreseen["latency"] == pytest.approx(count_seconds(model, x), rel=1e-12)


def random_importance(graph: ChannelGraph, binary: bool) -> dict[Space, torch.Tensor]:
    draws = {space: torch.rand(space.size, dtype=torch.double) for space in graph.spaces}
    return {space: (r > 0.4).double() if binary else r for space, r in draws.items()}


def alive_in(importance: dict[Space, torch.Tensor], threshold: float = 0.3) -> dict[Space, float]:
    return {space: float((r >= threshold).sum()) for space, r in importance.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(NETS))
def test_the_regulariser_is_the_cost_where_importance_is_0_or_1(name: str, kind: Any) -> None:
    graph = ChannelGraph.trace(NETS[name](), torch.zeros(1, 3, 8, 8))
    cost = cost_of(graph, kind)
    importance = random_importance(graph, binary=True)
    alive = alive_in(importance)
    widths = {space: int(count) for space, count in alive.items()}
    assert cost.value(importance, alive).item() == pytest.approx(cost(widths), rel=1e-12)
    some = dict(list(importance.items())[::2])  # the others cannot change
    kept = {space: space.size for space in importance if space not in some} | {s: widths[s] for s in some}
    assert cost.value(some, alive_in(some)).item() == pytest.approx(cost(kept), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(NETS))
def test_coefficients_are_the_derivative(name: str, kind: Any) -> None:
    graph = ChannelGraph.trace(NETS[name](), torch.zeros(1, 3, 8, 8))
    cost = cost_of(graph, kind)
    importance = {space: r.requires_grad_() for space, r in random_importance(graph, binary=False).items()}
    alive = alive_in(importance)
    gradients = torch.autograd.grad(cost.value(importance, alive), list(importance.values()))
    coefficients = cost.coefficients(alive)
    for space, gradient in zip(importance, gradients, strict=True):
        assert coefficients[space] > 0
        torch.testing.assert_close(gradient, torch.full_like(gradient, coefficients[space]), rtol=1e-12, atol=0.0)


def test_a_worked_example() -> None:
    """Two convolutions in a row, 3 -> 4 -> 5 -> out: the paper's form by hand."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(5 * 64, 2))
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8))
    cost = WidthCost(graph, "flops")
    first, second = graph.space("0"), graph.space("1")
    coefficients = cost.coefficients({first: 3.0, second: 5.0})
    assert coefficients[first] == 2 * 64 * 9 * 3 + 2 * 64 * 5 / 2  # image side fixed; both sides free, so halved
    assert coefficients[second] == 2 * 64 * 3 / 2 + 2 * 64 * 2  # each channel is 64 inputs of the classifier


def test_what_is_ignored_is_left_out() -> None:
    model = build(1)
    inside = [m for m in model.stages[1].modules() if isinstance(m, nn.Conv2d)]
    graph = ChannelGraph.trace(model, INPUT[:1], ["stages.1*"])
    flops = sum(2 * out * m.weight[0].numel() for m, _, out in called_layers(model, INPUT[:1]) if m not in inside)
    assert inside
    assert WidthCost(graph, "flops")() == flops


def test_an_unknown_kind_and_a_price_that_is_missing_or_not_asked_for_are_refused() -> None:
    graph = trace(build(1))
    with pytest.raises(ValueError, match="flops, model_size, latency"):
        WidthCost(graph, "params")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs term_of"):
        WidthCost(graph, "latency")
    with pytest.raises(ValueError, match="no other kind takes it"):
        WidthCost(graph, "flops", term_of=own_term)


def test_the_cost_of_widths_is_still_found_where_it_was() -> None:
    from morphtrain import morph
    from morphtrain.morph import WidthCost as Moved

    assert Moved is WidthCost
    with pytest.raises(AttributeError, match="has no attribute 'Typo'"):
        _ = morph.Typo
