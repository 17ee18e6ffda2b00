"""Channel union, block removal, rounding: the spec's worked examples and what must hold for any weights."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import INPUT, OPTIMIZERS, SHAPES, build, mask, outputs, step, trace
from torch import nn

from morphtrain.prune.reconfigure import channel_strength, live_channels, reconfigure


def chain(producer_alive: set[int], consumer_alive: set[int]) -> nn.Sequential:
    """Two convolutions around a space of 8, alive only where the sets say."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(256, 4)).double()
    with torch.no_grad():
        for channel in range(8):
            if channel not in producer_alive:
                model[0].weight[channel] = 1e-6
                model[0].bias[channel] = 0
            if channel not in consumer_alive:
                model[2].weight[:, channel] = -1e-6  # magnitude counts, not sign
    return model


@pytest.mark.parametrize(
    ("producer", "consumer", "left"),
    [
        ({0, 1, 2, 4, 5, 6, 7}, {0, 1, 2, 4, 5, 6, 7}, 7),
        ({0, 1, 2, 3, 5, 6, 7}, {0, 1, 3, 4, 6, 7}, 8),
        ({0, 1}, {1, 2}, 3),
    ],
)
def test_worked_examples_of_channel_union(producer: set[int], consumer: set[int], left: int) -> None:
    model = chain(producer, consumer)
    before = outputs(model)
    change = reconfigure(trace(model), threshold=1e-4)
    assert model[0].out_channels == model[2].in_channels == left
    assert bool(change) == (left < 8)
    for a, b in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def kill(model: nn.Module, fraction: float) -> None:
    """Make a random fraction of the channels of every space dead."""
    for space in trace(model).spaces:
        mask(space, (torch.rand(space.size) < fraction).nonzero().flatten())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.3, 0.8, 0.97])
@pytest.mark.parametrize("round_to", [1, 4])
def test_what_is_dead_goes_and_the_function_stays(shape: str, fraction: float, round_to: int) -> None:
    model = build(
        3,
        width=8,
        layers=3 if "bottleneck" in shape else 2,
        **{key: value for key, value in SHAPES[shape].items() if key != "layers"},
    ).train()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step(model, optimizer)
    kill(model, fraction)
    whole_branch = {b.path for b in trace(model).blocks if not channel_strength(b.spaces[-1]).any()}
    early = {b.path for b in trace(model).blocks if any(not channel_strength(s).any() for s in b.spaces)} - whole_branch
    before = outputs(model)
    graph = trace(model)
    change = reconfigure(graph, threshold=1e-4, round_to=round_to, optimizer=optimizer)
    assert set(change.removed_blocks) == whole_branch | early
    if not early:  # otherwise a block that put out a constant map now puts out its mean
        for a, b in zip(outputs(model), before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for axis in graph.axes:
        if axis.weight is not None and any(segment.space for segment in axis.segments):
            assert axis.length >= 1
            if round_to > 1 and axis.module is not model.classifier:
                assert axis.length % round_to == 0
    assert not reconfigure(trace(model), threshold=1e-4, round_to=round_to)
    step(model, optimizer)


def test_an_early_empty_space_removes_the_block_and_keeps_its_mean() -> None:
    model = build(1, width=8, layers=3)
    graph = trace(model)
    first, last = graph.blocks[0].spaces
    mask(first, torch.arange(first.size))
    assert channel_strength(last).any()
    change = reconfigure(graph, threshold=1e-4)
    assert change.removed_blocks[0] == graph_path(model)
    norm = model.stages[0][0].branch.norm
    training, evaluation = (model.train(m).stages[0][0].branch(torch.zeros(2, 8, 4, 4).double()) for m in (True, False))
    torch.testing.assert_close(training.flatten(), norm.bias)
    torch.testing.assert_close(evaluation.flatten(), norm.bias)


def graph_path(model: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if path.endswith("0.0.branch"))


def test_removing_a_block_frees_channels_only_it_used() -> None:
    model = build(2, width=8)
    with torch.no_grad():
        graph = trace(model)
        residual = graph.spaces[0]
        mask(residual, torch.tensor([5]))
        block = model.stages[0][1]
        block.branch[0].weight[:, 5] = 1.0  # alive, but only as an input of a block that is about to go
        inner = next(s for s in graph.spaces if s.name.startswith("stages.0.1"))
        for slot in inner.slots:
            if slot.role == "consumes":
                slot.axis.module.weight.zero_()
            if slot.role == "produces":
                slot.axis.module.weight.zero_()
    reconfigure(trace(model), threshold=1e-4)
    assert model.stem[0].out_channels == 7


@pytest.mark.parametrize("least", [1, 3])
def test_a_chain_keeps_its_strongest_channels(least: int) -> None:
    model = chain(set(), set())
    with torch.no_grad():
        model[0].weight[5] = 9e-5  # dead, but the least so
    reconfigure(trace(model), threshold=1e-4, min_channels=least)
    assert model[0].out_channels == least
    assert (model[0].weight.detach().abs().amax((1, 2, 3)) > 8e-5).any()


def test_rounding_keeps_the_strongest_dead_channels() -> None:
    model = chain({0, 1, 2}, {0, 1, 2})
    with torch.no_grad():
        model[2].weight[:, 6] = 5e-5
    reconfigure(trace(model), threshold=1e-4, round_to=4)
    assert model[0].out_channels == 4
    assert torch.isclose(model[2].weight.abs().amax((0, 2, 3)), torch.tensor(5e-5).double()).any()


def test_live_channels_counts_the_union() -> None:
    model = chain({0, 1}, {1, 2})
    graph = trace(model)
    assert live_channels(graph, 1e-4) == 3 + 4
    assert live_channels(graph, 0.0) == 8 + 4


def test_zero_branches_survive_a_second_trace() -> None:
    model = build(2, width=8)
    graph = trace(model)
    graph.remove_block(graph.blocks[1])
    again = trace(model)
    assert [(s.name, s.size) for s in again.spaces] == [(s.name, s.size) for s in graph.spaces]
    untouched = copy.deepcopy(model)
    again.reindex(again.spaces[0], range(again.spaces[0].size))
    torch.testing.assert_close(model.eval()(INPUT), untouched.eval()(INPUT))
