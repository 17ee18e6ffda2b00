"""Averages of weights follow every change of structure: they become what a network of them becomes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from computed_layers import WRAPS, made
from computed_layers import step as computed_step
from networks import INPUT, OPTIMIZERS, SHAPES, assert_close, build, dropped, mask, outputs, step, trace
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from morphtrain.averaging import kept
from morphtrain.grow.net2net import widen
from morphtrain.morph import Averages, ChannelGraph, Gate, averages_of
from morphtrain.optimizer.lars import LARS

Step = Callable[[nn.Module, Optimizer], None]
Change = Callable[[ChannelGraph, Optimizer | None], object]


def averaged(model: nn.Module, optimizer: Optimizer, take: Step = step, steps: int = 4) -> Averages:
    """The averages of a few steps, which are far from the weights."""
    averages = averages_of(optimizer)
    for _ in range(steps):
        take(model, optimizer)
        averages.update(model, 0.6)
    return averages


def network_of(averages: Averages, model: nn.Module) -> nn.Module:
    """A network by itself whose weights are the averages."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for own, parameter in zip(twin.parameters(), model.parameters(), strict=True):
            own.copy_(averages.values[parameter])
    return twin


def assert_are(averages: Averages, model: nn.Module, twin: nn.Module, tolerance: float = 1e-12) -> None:
    """The averages are the parameters of `twin`, each where the parameter that it is of lies in `model`."""
    assert averages.values.keys() == set(model.parameters()), "of nothing that has gone, and of all that is new"
    own, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert own.keys() == theirs.keys()
    for name, parameter in own.items():
        value = averages.values[parameter]
        assert value.shape == theirs[name].shape and not value.requires_grad, name
        assert value.stride() == parameter.stride(), name
        assert torch.allclose(value, theirs[name], rtol=0, atol=tolerance), name


# -- without changes --------------------------------------------------------------------------------------------


def test_they_are_those_of_torch_while_the_structure_stays() -> None:
    model = build(width=4)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    averages = averages_of(optimizer)
    for _ in range(5):
        step(model, optimizer)
        averages.update(model, 0.7)
        theirs.update_parameters(model)
    for parameter, value in zip(model.parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(averages.values[parameter], value)
        assert not torch.equal(parameter, value)


def test_in_16_bits_they_move_nevertheless() -> None:
    """By less than half the distance between two numbers of the format, which it would round away."""
    model = nn.Linear(3, 2).bfloat16()
    averages = averages_of(SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        model.weight.fill_(1.0)
        averages.update(model, 0.999)
        model.weight.fill_(1.5)
        for _ in range(500):
            averages.update(model, 0.999)
        value = averages.values[model.weight]
    assert value.dtype is torch.float32
    assert torch.allclose(value, torch.full((2, 3), 1.5 - 0.5 * 0.999**500), atol=1e-4)
    with averages.in_place(model.parameters()):
        assert model.weight.dtype is torch.bfloat16 and torch.equal(model.weight, value.bfloat16())
    assert (model.weight == 1.5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_written_in_place_of_the_weights_is_kept_and_costs_the_others_no_digit(dtype: torch.dtype) -> None:
    """As pruning does, which folds constants into the network of the averages."""
    layer = nn.Linear(3, 2).to(dtype)
    averages = averages_of(SGD(layer.parameters(), lr=0.1))
    averages.update(layer, 0.9)
    averages.values[layer.bias].copy_(torch.tensor([0.1, 0.2]))  # no numbers of 16 bits
    with averages.in_place(layer.parameters()), torch.no_grad():
        layer.bias[0] = 0.5
    assert averages.values[layer.bias].tolist() == torch.tensor([0.5, 0.2]).tolist()


def test_in_place_of_the_weights_they_leave_no_trace() -> None:
    model = build(width=4).to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    averages = averaged(model, optimizer)
    twin, before = network_of(averages, model), copy.deepcopy(model.state_dict())
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(ZeroDivisionError), averages.in_place(model.parameters()):
        assert_close(outputs(model), outputs(twin), 1e-12)
        raise ZeroDivisionError
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    step(model, optimizer)


# -- through changes --------------------------------------------------------------------------------------------


def pruned(graph: ChannelGraph, optimizer: Optimizer | None) -> None:
    graph.reindex_spaces({space: keep(space.name, space.size) for space in graph.spaces}, optimizer)


def keep(name: str, size: int) -> torch.Tensor:
    """Some channels of a space, the same in two networks."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.randperm(size, generator=generator)[: max(2, size // 2)].sort().values


def widened(graph: ChannelGraph, optimizer: Optimizer | None) -> None:
    widen(graph, factor=1.6, generator=torch.Generator().manual_seed(1), optimizer=optimizer)


def gated(graph: ChannelGraph, optimizer: Optimizer | None) -> None:
    last = graph.blocks[-1].branch.last
    graph.gate({last: Gate(reads=torch.tensor([0, 2, 3]), writes=torch.tensor([1, 3]))}, optimizer)


CHANGES: dict[str, Change] = {
    "pruned": pruned,
    "widened": widened,
    "gated": gated,
    "without a block": lambda graph, optimizer: graph.remove_block(graph.blocks[-1], optimizer),
    "with layers": lambda graph, optimizer: graph.insert_layer(graph.layer_places[:2], [INPUT], optimizer=optimizer),
    "with a block": lambda graph, optimizer: graph.insert_block(
        graph.stage_ends[1].path, [INPUT], start="zero_gamma", optimizer=optimizer
    ),
    "with half a block": lambda graph, optimizer: graph.insert_block(
        graph.stage_ends[1].path, [INPUT], start="half_half", optimizer=optimizer
    ),
}
MAKERS: dict[str, Callable[..., Optimizer]] = {
    **OPTIMIZERS,
    "lars": lambda p: LARS(p, lr=10.0, nesterov=True, weight_decay=1e-3),
}


def same_change(change: Change, model: nn.Module, optimizer: Optimizer, example: torch.Tensor) -> nn.Module:
    """Change a network with averages, and a network of these by itself, which is returned."""
    twin = network_of(averages_of(optimizer), model)
    for network, own in ((model, optimizer), (twin, None)):
        torch.manual_seed(7)
        change(ChannelGraph.trace(network, example), own)
    return twin


@pytest.mark.parametrize(("shape", "name"), list(zip(SHAPES, MAKERS, strict=True)))
@pytest.mark.parametrize("change", CHANGES)
def test_they_become_what_a_network_of_them_becomes(change: str, shape: str, name: str) -> None:
    """The oracle is that network, by itself, with the same change; then all of them in a row."""
    model = build(blocks=2, width=4, **SHAPES[shape]).to(memory_format=torch.channels_last)
    optimizer = MAKERS[name](model.parameters())
    averages = averaged(model, optimizer)
    twin = same_change(CHANGES[change], model, optimizer, INPUT[:1])
    assert_are(averages, model, twin)
    averaged(model, optimizer, steps=1)
    assert_are(averages, model, network_of(averages, model))


def test_they_follow_a_chain_of_changes() -> None:
    model = build(blocks=2, width=6)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    averages = averaged(model, optimizer)
    for change in ("widened", "with layers", "pruned", "with a block", "without a block", "widened", "gated"):
        assert_are(averages, model, same_change(CHANGES[change], model, optimizer, INPUT[:1]))
        averaged(model, optimizer, steps=2)


WIDE: Mapping[str, Change] = {name: CHANGES[name] for name in ("pruned", "widened")}


@pytest.mark.parametrize("change", WIDE)
@pytest.mark.parametrize("name", WRAPS)
def test_those_behind_computed_weights_compute_what_a_network_of_them_computes(name: str, change: str) -> None:
    """Under weight norm g follows the length of what is left of v, which is another one in the averages."""
    model = made(WRAPS[name])
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    averages = averaged(model, optimizer, computed_step)
    twin = same_change(WIDE[change], model, optimizer, INPUT)
    assert_are(averages, model, twin)
    with averages.in_place(model.parameters()):
        assert_close(outputs(model), outputs(twin), 1e-12)


def test_those_behind_spectral_norm_follow_its_original() -> None:
    layers = [spectral_norm(nn.Conv2d(3, 8, 1)), nn.ReLU(), spectral_norm(nn.Conv2d(8, 4, 3)), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4 * 36, 4)).double()
    optimizer = SGD(model.parameters(), lr=0.01)
    averages = averaged(model, optimizer)
    assert_are(averages, model, same_change(pruned, model, optimizer, INPUT))


# -- what the network of the averages computes --------------------------------------------------------------------


def computed_by_averages(model: nn.Module, averages: Averages) -> tuple[torch.Tensor, torch.Tensor]:
    """In training mode, in which norms go by the batch, and in evaluation mode with the network's statistics."""
    with averages.in_place(model.parameters()):
        return outputs(model)


@pytest.mark.parametrize("change", ["widened", "with layers", "with a block", "with half a block"])
def test_growth_keeps_what_they_compute(change: str) -> None:
    """With the statistics of the batch, which a run settles on. New norms pass on what the averages give them."""
    model = build(blocks=2, width=4)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    averages = averaged(model, optimizer)
    before, _ = computed_by_averages(model, averages)
    raw, _ = outputs(model)
    assert (before - raw).abs().max() > 0.01 * raw.abs().max(), "the averages are another network"
    CHANGES[change](trace(model), optimizer)
    after, _ = computed_by_averages(model, averages)
    assert (after - before).abs().max() <= 1e-9 * before.abs().max()


def test_uneven_shares_keep_what_they_compute() -> None:
    model = build(width=4)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    averages = averaged(model, optimizer)
    before = computed_by_averages(model, averages)
    widen(trace(model), factor=2, noise=0.5, optimizer=optimizer)
    assert_close(computed_by_averages(model, averages), before, 1e-12)


def test_pruned_they_compute_what_masked_they_did() -> None:
    model = build(blocks=2, width=6)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    averages = averaged(model, optimizer)
    masked = network_of(averages, model)
    for space in trace(masked).spaces:
        mask(space, dropped(space.size, keep(space.name, space.size)))
    pruned(trace(model), optimizer)
    assert_close(computed_by_averages(model, averages), outputs(masked), 1e-12)


# -- how much of them stays ----------------------------------------------------------------------------------------


def test_what_stays_after_some_epochs_does_not_depend_on_the_batch_size() -> None:
    """Of the weights after 20 epochs, half is left after each half-life; 8 or 800 steps an epoch."""
    for steps in (8, 80, 800):
        left = 1.0
        for number in range(1, 3 * steps + 1):
            left *= kept(1.5, 1 / steps, 20 + number / steps)
        assert left == pytest.approx(0.25, rel=1e-9)


def test_the_first_weights_are_soon_forgotten() -> None:
    """In a run that is young the half-life is a tenth of its age, so that nothing is left of its first tenth."""
    for steps in (10, 1000):
        left = 1.0
        for number in range(steps // 10 + 1, steps + 1):
            left *= kept(50.0, 1 / steps, number / steps)
        assert 0 < left < 1e-5
    assert kept(0.001, 1.0, 1.0) < 1e-300
