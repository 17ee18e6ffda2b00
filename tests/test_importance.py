"""How much channels matter, against the same thing computed otherwise; and what goes with a channel of a thin layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import build, together, trace
from topologies import TOPOLOGIES
from torch import nn

from morphtrain.cost import WidthCost
from morphtrain.morph import MIXING, Axis, ChannelGraph, Space
from morphtrain.prune.importance import Taylor, gamma, magnitude, rising
from morphtrain.prune.knapsack import within


def inner(model: nn.Module) -> tuple[ChannelGraph, Space, Any]:
    """A network, the space inside its first block, and the block's layers."""
    graph = trace(model)
    return graph, graph.space("stages.0.0.branch.0"), model.get_submodule("stages.0.0.branch")


def test_magnitude_is_the_share_of_the_squares_of_weights() -> None:
    graph, space, layers = inner(build())
    rows, columns = (layers[i].weight.detach().square() for i in (0, 3))
    wanted = rows.sum((1, 2, 3)) / rows.sum() + columns.sum((0, 2, 3)) / columns.sum()
    torch.testing.assert_close(magnitude(graph)[space], wanted)


def test_gamma_is_the_share_of_the_squares_of_scales() -> None:
    graph, space, layers = inner(build())
    scales = layers[1].weight.detach().square()
    torch.testing.assert_close(gamma(graph)[space], scales / scales.sum())
    head = ChannelGraph.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3))
    assert all(found.isinf().all() for found in gamma(head).values())


@pytest.mark.parametrize("measure", [magnitude, gamma])
def test_the_scale_of_a_layer_does_not_matter(measure: Any) -> None:
    model = build()
    graph = trace(model)
    before = measure(graph)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), 1):
            parameter.mul_(-number)
    for space, found in measure(graph).items():
        torch.testing.assert_close(found, before[space])


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_taylor_is_the_squared_derivative_by_a_gate(name: str) -> None:
    """Gates, multiplied in where a channel is read, and torch's own derivative by them; the mean over two steps."""
    make, inputs = TOPOLOGIES[name]
    torch.manual_seed(1)
    model, x = make().double().train(), inputs()
    graph = ChannelGraph.trace(model, x)
    taylor, squares = Taylor(), {space: torch.zeros(space.size, dtype=torch.double) for space in graph.spaces}
    for power in (2, 3):
        gates = {space: torch.ones(space.size, dtype=torch.double, requires_grad=True) for space in graph.spaces}
        handles = [hooked(axis, gates) for axis in graph.axes if axis.role == "consumes" and is_layer(axis)]
        (together(model(*x)) ** power).mean().backward()
        for handle in handles:
            handle.remove()
        taylor.look(graph)
        taylor.look(graph)  # of a step that was done again, the last look counts
        taylor.count()
        taylor.count()
        for space, gate in gates.items():
            squares[space] += 0.0 if gate.grad is None else gate.grad.square() / 2
        model.zero_grad()
    compared = 0
    for space, found in taylor.importance(graph).items():
        readers = [slot.axis for slot in space.slots if slot.role == "consumes"]
        if any(not axis.weight.requires_grad for axis in readers if axis.weight is not None):
            assert found.isinf().all()
        elif all(map(is_layer, readers)):
            torch.testing.assert_close(found, squares[space], rtol=1e-6, atol=1e-12 * float(squares[space].max()))
            compared += 1
    assert compared or name in ("Functional", "SeveralInputs")
    assert taylor.steps == (2 if graph.spaces else 0)


def is_layer(axis: Axis) -> bool:
    return isinstance(axis.module, MIXING)


def hooked(axis: Axis, gates: dict[Space, torch.Tensor]) -> Any:
    """A layer whose inputs go through the gates of their channels first."""
    module: Any = axis.module
    dim = 1 - module.weight.dim()

    def gated(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        parts = [
            gates[s.space].repeat_interleave(s.span) if s.space else torch.ones(s.fixed_size, dtype=torch.double)
            for s in axis.segments
        ]
        gate, (x,) = torch.cat(parts), args
        shape = [1] * x.dim()
        shape[dim] = -1
        return (x * gate.repeat(x.shape[dim] // len(gate)).view(shape),)

    return module.register_forward_pre_hook(gated)


def test_a_step_that_was_skipped_does_not_count() -> None:
    model = build()
    graph, taylor = trace(model), Taylor()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    taylor.look(graph)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    taylor.look(graph)
    taylor.count()
    assert taylor.steps == 1
    assert all(found.isfinite().all() for found in taylor.importance(graph).values())


def test_taylor_is_even_without_steps_and_the_same_from_its_state() -> None:
    model = build()
    graph, taylor, other = trace(model), Taylor(), Taylor()
    assert all(bool((found == 1).all()) for found in taylor.importance(graph).values())
    together(model(torch.randn(2, 3, 8, 8, dtype=torch.double))).square().mean().backward()
    taylor.look(graph)
    taylor.count()
    other.load_state_dict(taylor.state_dict())
    found, again = taylor.importance(graph), other.importance(graph)
    assert all(torch.equal(found[space], again[space]) for space in graph.spaces)
    assert all(values.any() for values in found.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_amounts_rise_and_add_up_to_the_logarithm_of_what_is_left(values: list[float]) -> None:
    importance = torch.tensor(values, dtype=torch.double)
    amounts = rising(importance)
    order = importance.argsort(stable=True)
    ordered = amounts[order]
    assert (ordered[1:] >= ordered[:-1]).all(), "the least important go first"
    assert (amounts >= importance * (1 - 1e-9)).all(), "the first order is the least that goes"
    total = float(importance.sum())
    for count in range(len(values)):
        left = float(importance[order[count:]].sum())
        if left > 1e-6 * total:
            lost = total * torch.log(torch.tensor(total / left, dtype=torch.double))
            torch.testing.assert_close(amounts[order[:count]].sum(), lost, rtol=1e-6, atol=1e-6 * total)
    if total > 0:
        assert amounts[order[-1]] == torch.inf, "the last one never goes"
    assert torch.equal(rising(importance * 4), amounts * 4)


def test_infinite_importances_stay() -> None:
    importance = torch.tensor([torch.inf, torch.inf], dtype=torch.double)
    assert torch.equal(rising(importance), importance)


def test_layers_that_matter_alike_become_narrower_together() -> None:
    """Amounts that do not rise would take all that they can from some of them."""
    convs = [layer for _ in range(6) for layer in (nn.Conv2d(32, 32, 1, bias=False), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 32, 1), *convs, nn.Conv2d(32, 8, 1))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 4, 4))
    cost, alike = WidthCost(graph, "flops"), magnitude(graph)

    def widths(lost: dict[Space, torch.Tensor]) -> list[int]:
        return [int(mask.sum()) for mask in within(graph, lost, cost, 0.25 * cost()).values()]

    raised, plain = widths({space: rising(found) for space, found in alike.items()}), widths(alike)
    assert len(raised) == 7
    assert min(raised) >= 8
    assert min(plain) <= 4
