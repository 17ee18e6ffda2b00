"""Layers whose weight is computed (`torch.nn.utils.parametrize`): weight norm, spectral norm, and one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from computed_layers import (
    WRAPS,
    Fickle,
    Masked,
    Net,
    OneWay,
    Squashed,
    Symmetric,
    Wrap,
    X,
    made,
    own,
    shared_computation,
    step,
    two_spectral,
)
from networks import assert_close, check_surgery, outputs
from test_resume import assert_same
from torch import fx, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import SGD, Adam

from morphtrain.cost import WidthCost, count_macs, count_params
from morphtrain.cost.layer_steps import LayerSteps
from morphtrain.cost.params import count_weights
from morphtrain.cost.widths import layers_of
from morphtrain.grow import widen
from morphtrain.grow.size import params_at
from morphtrain.morph import ChannelGraph, Gate, MorphError, additions_of, describe
from morphtrain.morph.effective import effective, fold, parameters_of, scale
from morphtrain.optimizer.groups import decay_groups
from morphtrain.prune.fading import Fading

# -- cut and widened ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRAPS)
def test_sliced_equals_masked_and_widening_keeps_the_function(name: str) -> None:
    torch.manual_seed(0)
    graph = check_surgery(Net(WRAPS[name]), (X,), tolerance=1e-12)
    assert {"stem", "a", "plain", "up"} <= {space.name for space in graph.spaces}
    assert not any(space.is_ambiguous for space in graph.spaces)


@pytest.mark.parametrize("name", ["weight norm", "weight norm of inputs", "weight norm of the whole"])
def test_a_chain_of_changes_keeps_the_function_and_gives_what_a_plain_network_gives(name: str) -> None:
    """The oracle is the same network with plain weights, changed in the same way."""
    model = made(WRAPS[name])
    plain = copy.deepcopy(model)
    fold(plain)
    graphs = [ChannelGraph.trace(network, X) for network in (model, plain)]
    assert [repr(space) for space in graphs[0].spaces] == [repr(space) for space in graphs[1].spaces]
    for round in range(3):
        index = {space.name: torch.randperm(space.size)[: max(space.size - 1 - round, 2)] for space in graphs[0].spaces}
        for graph in graphs:
            graph.reindex_spaces({space: index[space.name] for space in graph.spaces})
        before = outputs(model, (X,))
        assert_close(before, outputs(plain, (X,)), 1e-12)
        for graph in graphs:
            widen(graph, factor=1.6, generator=torch.Generator().manual_seed(round), noise=0.3)
        assert_close(outputs(model, (X,)), before, 1e-12)
        assert_close(outputs(model, (X,)), outputs(plain, (X,)), 1e-12)
    for path in ("stem", "a", "grouped", "depthwise", "up", "head"):
        assert torch.allclose(
            effective(model.get_submodule(path)), plain.get_submodule(path).weight, rtol=0, atol=1e-12
        )


def test_copies_of_a_channel_are_read_by_uneven_shares() -> None:
    model = made(weight_norm)
    expected, graph = outputs(model, (X,)), ChannelGraph.trace(model, X)
    widen(graph, target={"a": 12}, noise=0.5)
    assert_close(outputs(model, (X,)), expected, 1e-12)
    columns = effective(model.b).flatten(1).T
    assert len(columns.unique(dim=0)) == 12, "copies with equal shares would stay alike for ever"


@pytest.mark.parametrize("name", WRAPS)
def test_uneven_shares_keep_the_function_of_every_weight_that_can_be_widened(name: str) -> None:
    torch.manual_seed(0)
    model = made(WRAPS[name])
    expected, graph = outputs(model, (X,)), ChannelGraph.trace(model, X)
    assert len(widen(graph, factor=2, noise=0.5, generator=torch.Generator().manual_seed(0))) == len(graph.spaces)
    assert_close(outputs(model, (X,)), expected, 1e-12)
    assert len(effective(model.b).flatten(1).T.unique(dim=0)) == 12, "copies with equal shares would stay alike"


def test_what_is_zero_does_not_become_not_a_number() -> None:
    model = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 1)), nn.ReLU(), weight_norm(nn.Conv2d(4, 3, 1))).double()
    v = model[2].parametrizations.weight.original1
    with torch.no_grad():
        v[0] = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.double)[:, None, None]  # reads only what goes
        v[1, 2:] = 0
    graph = ChannelGraph.trace(model, X)
    wanted = effective(model[2])[:, :3]
    graph.reindex(graph.spaces[0], [0, 1, 2])
    found = effective(model[2])
    assert torch.allclose(found, wanted, rtol=0, atol=1e-15)
    assert (found[0] == 0).all() and found[1].abs().max() > 0
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# -- optimizer state ------------------------------------------------------------------------------------------


def test_momentum_of_length_and_direction_follows() -> None:
    model = made(weight_norm)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        step(model, optimizer)
    graph = ChannelGraph.trace(model, X)
    (space,) = (space for space in graph.spaces if space.name == "a")
    g, v = (getattr(model.b.parametrizations.weight, name) for name in ("original0", "original1"))
    of_g, of_v = (optimizer.state[p]["momentum_buffer"].clone() for p in (g, v))
    rows = optimizer.state[model.a.parametrizations.weight.original0]["momentum_buffer"].clone()
    index = [0, 1, 3, 3]
    graph.reindex(space, index, optimizer)
    new = model.b.parametrizations.weight
    share = torch.tensor([1, 1, 0.5, 0.5], dtype=torch.double)[:, None, None]
    norms = [w.flatten(1).norm(dim=1)[:, None, None, None] for w in (v, v[:, index] * share)]
    moments = [optimizer.state[p]["momentum_buffer"] for p in (new.original0, new.original1)]
    assert torch.allclose(moments[0], of_g * norms[1] / norms[0], rtol=1e-12)
    assert torch.allclose(moments[1], of_v[:, index] * share, rtol=1e-12)
    moment = optimizer.state[model.a.parametrizations.weight.original0]["momentum_buffer"]
    assert torch.allclose(moment, rows[index], rtol=1e-12)
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_adam_goes_on_with_state_of_the_new_shapes() -> None:
    model = made(lambda layer: weight_norm(layer, dim=None))
    optimizer = Adam(model.parameters(), lr=0.01)
    step(model, optimizer)
    graph = ChannelGraph.trace(model, X)
    for index in ([0, 2, 3], [0, 1, 2, 2, 1]):
        graph.reindex_spaces({space: index for space in graph.spaces if space.size > 4 or len(index) > 3}, optimizer)
        assert all(optimizer.state[p]["exp_avg_sq"].shape == p.shape for p in model.parameters())
        step(model, optimizer)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, two_spectral], ids=["weight", "spectral", "both"])
def test_without_dead_channels_training_goes_on_as_with_them(wrap: Wrap) -> None:
    """Function, momentum and the power iteration: three steps of the cut network equal those of the uncut one."""
    model = made(wrap, norms=False)
    graph = ChannelGraph.trace(model, X)
    (space,) = (space for space in graph.spaces if space.name == "a")
    gone = torch.tensor([1, 4])
    with torch.no_grad():
        model.a.bias[gone] = 0
        scale(model.a, "weight", torch.ones(6).index_fill_(0, gone, 0.0).view(-1, 1, 1, 1))
        scale(model.b, "weight", torch.ones(6).index_fill_(0, gone, 0.0).view(1, -1, 1, 1))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        step(model, optimizer)
    uncut = copy.deepcopy(model)
    uncut_optimizer = SGD(uncut.parameters(), lr=0.1, momentum=0.9)
    uncut_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert bool((effective(uncut.a)[gone] == 0).all()), "it stays dead by itself"
    graph.reindex(space, [0, 2, 3, 5], optimizer)
    assert_close(outputs(model, (X,)), outputs(uncut, (X,)), 1e-12)
    for _ in range(3):
        step(model, optimizer)
        step(uncut, uncut_optimizer)
    assert_close(outputs(model, (X,)), outputs(uncut, (X,)), 1e-11)
    assert model.a.out_channels == model.b.in_channels == 4


def test_what_growth_adds_behind_a_computed_weight_has_its_own_learning_rate() -> None:
    model = made(weight_norm)
    optimizer = SGD(model.parameters(), lr=0.1)
    graph = ChannelGraph.trace(model, X)
    additions = additions_of(optimizer)
    additions.growth = 1
    graph.reindex(graph.space("a"), [0, 1, 2, 3, 4, 5, 5], optimizer)
    additions.set_factors({1: 0.0})
    a, b = model.a.parametrizations.weight, model.b.parametrizations.weight
    assert additions.numbers[a.original0].flatten().tolist() == [0] * 6 + [1]
    assert additions.numbers[a.original1][:, 0, 0, 0].tolist() == [0] * 6 + [1]
    assert additions.numbers[b.original1][0].flatten().tolist() == [0] * 6 + [1]
    assert b.original0 not in additions.numbers


# -- spectral norm --------------------------------------------------------------------------------------------


def settle(layer: Any) -> None:
    """What a cut does to the singular vectors if more than zeros has gone."""
    norm = layer.parametrizations.weight[0]
    norm._power_method(norm._reshape_weight_to_matrix(layer.parametrizations.weight.original.detach()), 15)


@pytest.mark.parametrize("transposed", [False, True])
def test_spectral_norm_of_live_channels_is_that_of_the_masked_weight(transposed: bool) -> None:
    torch.manual_seed(0)
    middle = nn.ConvTranspose2d(8, 6, 3, padding=1) if transposed else nn.Conv2d(8, 6, 3, padding=1)
    layers = [spectral_norm(nn.Conv2d(3, 8, 1)), nn.ReLU(), spectral_norm(middle), nn.ReLU(), nn.Conv2d(6, 4, 1)]
    model = nn.Sequential(*layers).double()
    masked = copy.deepcopy(model)
    graph = ChannelGraph.trace(model, X)
    assert [(space.size, space.is_ambiguous) for space in graph.spaces] == [(8, True), (6, True)]
    keep = [torch.tensor([0, 2, 3, 5, 7]), torch.tensor([1, 2, 4])]
    graph.reindex_spaces(dict(zip(graph.spaces, keep, strict=True)))
    alive = [torch.zeros(size).index_fill_(0, kept, 1.0) for size, kept in zip((8, 6), keep, strict=True)]
    into, out = (0, 1) if transposed else (1, 0)

    def along(dim: int, values: torch.Tensor) -> torch.Tensor:
        return values.view([-1 if d == dim else 1 for d in range(4)])

    scale(masked[0], "weight", along(0, alive[0]))
    scale(masked[2], "weight", along(into, alive[0]))
    scale(masked[2], "weight", along(out, alive[1]))
    scale(masked[4], "weight", along(1, alive[1]))
    with torch.no_grad():
        masked[0].bias.mul_(alive[0])
        masked[2].bias.mul_(alive[1])
    settle(masked[0])
    settle(masked[2])
    assert_close(outputs(model, (X,)), outputs(masked, (X,)), 1e-12)
    for layer, dim in ((model[0], 0), (model[2], out)):
        matrix = effective(layer).detach().movedim(dim, 0).flatten(1)
        assert torch.linalg.matrix_norm(matrix, 2) == pytest.approx(1, abs=0.05)


def test_spectral_norm_is_not_widened() -> None:
    model = made(two_spectral)
    expected, graph = outputs(model, (X,)), ChannelGraph.trace(model, X)
    before = copy.deepcopy(model.state_dict())
    blocked = {space.name for space in graph.spaces if space.is_ambiguous}
    assert blocked == {"stem", "a", "plain", "up"}
    with pytest.raises(MorphError, match=r"^'a' cannot be widened: copies .* 'b' computes, whose weight is computed$"):
        graph.reindex(graph.space("a"), [0, 1, 2, 3, 4, 5, 5])
    assert_same(model.state_dict(), before)
    changed = widen(graph, factor=2)
    assert set(changed) == {"grouped"}
    assert_close(outputs(model, (X,)), expected, 1e-12)


def test_a_permutation_of_spectral_norm_is_exact() -> None:
    model = made(spectral_norm)
    expected = outputs(model, (X,))
    graph = ChannelGraph.trace(model, X)
    graph.reindex_spaces({space: torch.randperm(space.size) for space in graph.spaces})
    assert_close(outputs(model, (X,)), expected, 1e-12)


def test_nothing_but_zeros_is_refused() -> None:
    model = nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 1)), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
    scale(model[0], "weight", torch.tensor([1.0, 1, 0, 0]).view(-1, 1, 1, 1))
    graph = ChannelGraph.trace(model, X)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MorphError, match=r"^'0': its weight is computed by SpectralNorm, which would divide by zero"):
        graph.reindex(graph.spaces[0], [2, 3])
    assert_same(model.state_dict(), before)


# -- other parametrisations -----------------------------------------------------------------------------------


def shared_direction(layer: Any) -> nn.Module:
    """Two layers with a common v, each with a g of its own."""
    first, second = weight_norm(nn.Conv2d(8, 8, 1)), weight_norm(nn.Conv2d(8, 8, 1))
    second.parametrizations.weight.original1 = first.parametrizations.weight.original1
    return nn.Sequential(first, second)


def shared_step(layer: Any) -> nn.Module:
    """Two layers with one step that has a buffer."""
    layers = [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)]
    masked = Masked(layers[0].weight)
    return nn.Sequential(*(register_parametrization(one, "weight", masked) for one in layers))


KEPT: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "symmetric": (own(Symmetric), "1: all: its weight is computed by Symmetric, which gives another"),
    "orthogonal": (
        lambda layer: nn.Sequential(nn.Flatten(2), orthogonal(nn.Linear(64, 64)), nn.Unflatten(2, (8, 8))),
        "1.1: all: its weight is computed by Orthogonal, which gives another",
    ),
    "bias": (lambda layer: weight_norm(layer, "bias"), "1: all: its bias is computed by WeightNorm"),
    "one computation": (shared_computation, "1.0: all: its weight is computed by WeightNorm from what others use"),
    "one direction": (shared_direction, "1.1: all: its weight is computed by WeightNorm from what others use"),
    "one step": (shared_step, "1.1: all: its weight is computed by Masked from what others use"),
    "a norm": (lambda layer: weight_norm(nn.BatchNorm2d(8)), "1: all: its weight is computed by WeightNorm"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_follow_is_kept_and_the_rest_is_not(name: str) -> None:
    make, said = KEPT[name]
    torch.manual_seed(0)
    layer = make(nn.Conv2d(8, 8, 1))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1)).double()
    before = copy.deepcopy(model.state_dict())
    graph = ChannelGraph.trace(model, X)
    assert [f"{path}: {why}" for path, why in graph.kept.items() if f"{path}: {why}".startswith(said)]
    assert {space.size for space in graph.spaces} <= {6, 64} and graph.spaces[-1].name == "2"
    assert_same(model.state_dict(), before)
    graph.reindex(graph.space("2"), range(4))
    assert model(X).shape == (4, 5, 8, 8)


def test_an_inverse_is_used_and_what_has_none_is_not_widened() -> None:
    for kind, widens in ((Squashed, True), (OneWay, False)):
        model = made(own(kind))
        expected, graph = outputs(model, (X,)), ChannelGraph.trace(model, X)
        assert graph.space("a").is_ambiguous != widens
        if widens:
            graph.reindex(graph.space("a"), [0, 1, 2, 3, 4, 5, 0, 0])
            assert_close(outputs(model, (X,)), expected, 1e-12)
        else:
            graph.reindex(graph.space("a"), [5, 4, 3, 2, 1, 0])
            assert_close(outputs(model, (X,)), expected, 1e-12)


def test_what_turns_out_not_to_follow_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), own(Fickle)(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 3, 1)).double()
    graph = ChannelGraph.trace(model, X)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MorphError, match=r"^'2': its weight is computed by Fickle, which gives another weight"):
        graph.reindex_spaces({space: [0, 1, 2] for space in graph.spaces})
    assert_same(model.state_dict(), before)
    graph.reindex_spaces({space: range(5) for space in graph.spaces})
    assert model(X).shape == (4, 3, 8, 8)


class Reading(nn.Module):
    """Its code reads a computed weight besides calling the layer."""

    def __init__(self, first: bool, behind: bool) -> None:
        super().__init__()
        self.a, self.b = weight_norm(nn.Conv2d(3, 8, 1)), weight_norm(nn.Conv2d(8, 6, 1))
        self.c, self.d = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)
        self.first, self.behind = first, behind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            length = self.read()
            return self.d(self.c(self.b(self.a(x)))) * length
        y = self.d(self.c(self.b(self.a(x))))
        return y * self.read()

    def read(self) -> torch.Tensor:
        weight = self.b.parametrizations.weight.original1 if self.behind else self.b.weight
        return weight.norm()


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_computed_weight_that_code_reads_keeps_its_shape(first: bool, behind: bool) -> None:
    graph = ChannelGraph.trace(Reading(first, behind).double(), X)
    assert [space.name for space in graph.spaces] == ["c"]


# -- tracing, surgery and costs -------------------------------------------------------------------------------


def test_copies_and_traced_networks_are_recognised_and_tracing_leaves_no_mark() -> None:
    model = made(two_spectral).train()
    before = copy.deepcopy(model.state_dict())
    names = [repr(space) for space in ChannelGraph.trace(model, X).spaces]
    assert len(names) == 5
    assert [repr(space) for space in ChannelGraph.trace(copy.deepcopy(model), X).spaces] == names
    traced = fx.symbolic_trace(model)
    assert sorted(repr(space) for space in ChannelGraph.trace(traced, X).spaces) == sorted(names)
    graph = ChannelGraph.trace(model, X)
    twin = copy.deepcopy(graph)
    twin.reindex(twin.space("a"), [0, 1])
    assert model.a.out_channels == 6 and twin.model.a.out_channels == 2
    describe(model)
    assert count_params(model) > count_weights(model) > 0 < WidthCost(graph, "flops")()
    assert_same(model.state_dict(), before)


def test_a_gate_a_layer_and_a_block_beside_computed_weights() -> None:
    model = made(weight_norm, norms=False)
    with torch.no_grad():
        scale(model.b, "weight", torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1]).view(-1, 1, 1, 1))
        scale(model.b, "weight", torch.tensor([1.0, 0, 1, 1, 1, 1]).view(1, -1, 1, 1))
    expected = outputs(model, (X,))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    graph = ChannelGraph.trace(model, X)
    graph.gate({"b": Gate(torch.tensor([0, 2, 3, 4, 5]), torch.arange(2, 8))}, optimizer)
    assert_close(outputs(model, (X,)), expected, 1e-12)
    assert effective(model.b[1]).shape[:2] == (6, 5)
    graph.insert_layer("grouped", optimizer=optimizer)
    graph.insert_block("a", optimizer=optimizer)
    assert not [why for why in graph.kept.values() if "computed" in why], "nor do layers beside others look computed"
    assert_close(outputs(model, (X,)), expected, 1e-12)
    step(model, optimizer)
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_a_gate_that_cannot_be_is_refused_before_any_is_put() -> None:
    layers = [
        nn.Conv2d(3, 8, 1, bias=False),
        nn.Conv2d(8, 8, 1),
        own(Symmetric)(nn.Conv2d(8, 8, 1)),
        nn.Conv2d(8, 4, 1),
    ]
    model = nn.Sequential(*layers).double()
    graph, before = ChannelGraph.trace(model, X), copy.deepcopy(model.state_dict())
    with pytest.raises(MorphError, match=r"^'2': its weight is computed by Symmetric, which"):
        graph.gate({"1": Gate(torch.arange(4)), "2": Gate(torch.arange(4))})
    assert_same(model.state_dict(), before)


def test_fading_out_leaves_the_state_of_spectral_norm_as_it_is() -> None:
    """Or a run that is resumed while channels fade would not go on with the same bits."""
    model = made(spectral_norm).train()
    graph, before = ChannelGraph.trace(model, X), copy.deepcopy(dict(model.named_buffers()))
    Fading(graph, {space: torch.arange(space.size) == 0 for space in graph.spaces}, 1.0)
    assert_same(dict(model.named_buffers()), before)


def test_channels_fade_where_a_weight_that_makes_them_cannot() -> None:
    """The weights that use them can, so that the cut changes nothing."""
    model = nn.Sequential(own(OneWay)(nn.Conv2d(3, 4, 1)), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
    graph, before = ChannelGraph.trace(model, X), effective(model[0])
    fading = Fading(graph, {graph.spaces[0]: torch.tensor([True, False, False, True])}, 1.0)
    fading.fade(0.5)
    assert torch.equal(effective(model[0]), before)
    fading.fade(0.0)
    expected = outputs(model, (X,))
    fading.cut(SGD(model.parameters(), lr=0.1))
    assert model[0].out_channels == 2
    assert_close(outputs(model, (X,)), expected, 1e-12)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_lengths_decay_however_many_a_weight_has(dim: int | None) -> None:
    layer = weight_norm(nn.Conv2d(3, 4, 1), dim=dim)
    decaying, plain, directions = (group["params"] for group in decay_groups(layer, 0.1))
    g, v = parameters_of(layer)
    assert [id(p) for p in (*decaying, *plain, *directions)] == [id(p) for p in (g, layer.bias, v)]


def test_a_dead_block_goes_with_all_that_its_weights_are_computed_from() -> None:
    model = made(weight_norm)
    with torch.no_grad():
        scale(model.b, "weight", torch.zeros(()))
    expected = outputs(model, (X,))
    optimizer = SGD(model.parameters(), lr=0.1)
    graph = ChannelGraph.trace(model, X)
    (block,) = (block for block in graph.blocks if block.kind == "sum")
    graph.remove_block(block, optimizer)
    assert_close(outputs(model, (X,)), expected, 1e-12)
    assert not [name for name, _ in model.named_parameters() if name.startswith(("a.", "b."))]
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_costs_are_those_of_the_plain_network() -> None:
    model = made(weight_norm).train()
    plain = copy.deepcopy(model)
    fold(plain)
    ours, theirs = ChannelGraph.trace(model, X), ChannelGraph.trace(plain, X)
    assert count_macs(model, (3, 8, 8)) == count_macs(plain, (3, 8, 8))
    assert count_weights(model, 0.05) == count_weights(plain, 0.05)
    lengths = sum(p.numel() for name, p in model.named_parameters() if name.endswith("original0"))
    assert count_params(model) == count_params(plain) + lengths
    for kind in ("flops", "model_size"):
        costs = [WidthCost(graph, kind) for graph in (ours, theirs)]
        assert costs[0]() == costs[1]()
        assert costs[0]({ours.space("a"): 9}) == costs[1]({theirs.space("a"): 9})
    widths = {"stem": 11, "a": 9}
    predicted = params_at(ours)({ours.space(name): width for name, width in widths.items()})
    steps = [LayerSteps(graph, 4) for graph in (ours, theirs)]
    assert [steps[0].kind(layer) for layer in layers_of(ours)] == [steps[1].kind(layer) for layer in layers_of(theirs)]
    layer = layers_of(ours)[1]
    steps[0].step(layer, steps[0].widths(layer)[-1])()
    widen(ours, target=widths)
    assert count_params(model) == predicted
