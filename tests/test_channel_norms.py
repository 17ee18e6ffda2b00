"""MorphNet's members and its proximal step, against a numerical minimiser and against networks cut for real."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import INPUT, assert_close, build, outputs, trace
from scipy.optimize import minimize
from test_zoo import network
from topologies import TOPOLOGIES, Net, conv
from torch import nn

from morphtrain.cost import WidthCost
from morphtrain.morph import ChannelGraph, Space, additions_of
from morphtrain.prune.bias_folding import CONSTANTS
from morphtrain.prune.channel_norms import ChannelNorms


def minimiser(members: np.ndarray, amount: float, lengths: np.ndarray) -> np.ndarray:
    """argmin sum((x - members)^2 / lengths) / 2 + amount * max |x|, with the maximum as a bound of its own."""
    start = np.append(members, np.abs(members).max())
    bounds = [
        {"type": "ineq", "fun": lambda x, i=i, sign=sign: x[-1] - sign * x[i]}
        for i in range(len(members))
        for sign in (1, -1)
    ]
    found = minimize(
        lambda x: 0.5 * (np.square(x[:-1] - members) / lengths).sum() + amount * x[-1],
        start,
        jac=lambda x: np.append((x[:-1] - members) / lengths, amount),
        constraints=bounds,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x[:-1]


def residual_members(model: nn.Module, regulariser: str) -> list[torch.Tensor]:
    """What stands for the channels of the (only) residual space of a network of one stage."""
    layers = [model.stem, *(block.branch for block in model.stages[0])]
    norms = [layer[1] if layer is model.stem else layer[4] for layer in layers]
    convolutions = [layer[0] if layer is model.stem else layer[3] for layer in layers]
    return [layer.weight for layer in (norms if regulariser == "gamma_l1" else convolutions)]


@pytest.mark.parametrize("regulariser", ["gamma_l1", "group_lasso"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), amount=st.sampled_from([0.0, 0.05, 0.5, 3.0, 30.0]), alike=st.booleans())
def test_shrinking_solves_the_proximal_problem(regulariser: Any, seed: int, amount: float, alike: bool) -> None:
    torch.manual_seed(seed)
    model = build(2, width=3, stages=1)
    members = residual_members(model, regulariser)
    with torch.no_grad():
        for member in members:
            member.mul_(3 * torch.rand(3, 1, 1, 1).squeeze() if member.dim() == 1 else 3 * torch.rand(3, 1, 1, 1))
    before = [member.detach().clone() for member in members]
    others = {name: p.detach().clone() for name, p in model.named_parameters() if all(p is not m for m in members)}
    graph = trace(model)
    norms = ChannelNorms(graph, regulariser)
    space = graph.space("stem.0")
    steps = {id(member): 1.0 if alike else 0.3 * (number + 1) for number, member in enumerate(members)}
    lengths = torch.cat(
        [torch.full((n,), steps.get(key, 1.0)) for key, n in zip(norms.weights, norms.lengths, strict=True)]
    )
    amounts = norms.per_channel({s: amount if s is space else 0.0 for s in norms.spaces})
    norms.shrink(amounts, None if alike else torch.cat([lengths, torch.ones(1)]).to(amounts))
    for channel in range(3):
        sizes = np.array([b[channel].norm().item() for b in before])
        wanted = minimiser(sizes, amount, np.array(list(steps.values())))
        for old, new, was, want in zip(before, members, sizes, wanted, strict=True):
            np.testing.assert_allclose(new[channel].detach(), old[channel] * (want / was), atol=2e-5)
    for name, other in others.items():
        assert torch.equal(model.get_parameter(name), other), name


def test_one_member_is_soft_thresholded_to_exact_zero() -> None:
    model = build(1, width=4)
    graph = trace(model)
    norms = ChannelNorms(graph, "gamma_l1")
    inner = graph.space("stages.0.0.branch.0")
    gamma = model.stages[0][0].branch[1].weight
    with torch.no_grad():
        gamma.copy_(torch.tensor([0.3, -0.5, 0.1, -0.2]))
    norms.shrink(norms.per_channel({s: 0.25 if s is inner else 0.0 for s in norms.spaces}))
    torch.testing.assert_close(gamma.detach(), torch.tensor([0.05, -0.25, 0.0, 0.0]).double())
    assert (gamma[2:] == 0).all()
    assert norms.alive(0.1)[inner] == 1


@pytest.mark.parametrize("regulariser", ["gamma_l1", "group_lasso"])
def test_strength_and_penalty_are_those_of_the_largest_member(regulariser: Any) -> None:
    model = build(3, width=5, stages=1)
    graph = trace(model)
    norms = ChannelNorms(graph, regulariser)
    wanted = torch.stack(
        [
            m.detach().flatten(1).norm(dim=1) if m.dim() > 1 else m.detach().abs()
            for m in residual_members(model, regulariser)
        ]
    ).amax(0)
    torch.testing.assert_close(norms.importance()[graph.space("stem.0")], wanted)
    slopes = {space: 0.5 + number for number, space in enumerate(norms.spaces)}
    total = sum(slopes[space] * r.sum() for space, r in norms.importance().items())
    torch.testing.assert_close(norms.penalty(norms.per_channel(slopes)), total)


def test_the_regulariser_at_the_start_is_the_cost() -> None:
    """All gammas are one then, and every layer of these networks has a side that can change."""
    for model in (build(2, width=4), network("mobilenet_v2"), network("densenet121")):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
        x = torch.zeros(1, 3, 32, 32)
        graph = ChannelGraph.trace(model, x)
        cost, norms = WidthCost(graph, "flops"), ChannelNorms(graph, "gamma_l1")
        slopes = norms.per_channel(cost.coefficients(norms.alive(1e-2)))
        assert norms.spaces
        assert set(norms.spaces) == set(graph.spaces)
        assert norms.penalty(slopes.double()).item() == pytest.approx(cost(), rel=1e-6)


def silence(graph: ChannelGraph, regulariser: Any, channels: dict[Space, torch.Tensor]) -> None:
    """Zero the members and biases of some channels, and nothing else that makes or uses them."""
    ChannelNorms(graph, regulariser).clear(channels)
    for space, dead in channels.items():
        for slot in space.slots:
            rows = (slot.start + dead.nonzero() * slot.segment.span + torch.arange(slot.segment.span)).flatten()
            for name, dim in slot.axis.tensors:
                if slot.role != "consumes" and name in CONSTANTS:
                    getattr(slot.axis.module, name).data.index_fill_(dim, rows, 0.0)


# Vectors in the code are not members: they still add a constant, not zero, to a silent channel.
SILENT = [name for name in TOPOLOGIES if name not in ("Scaled", "Functional")]


@pytest.mark.parametrize("regulariser", ["gamma_l1", "group_lasso"])
@pytest.mark.parametrize("name", SILENT)
def test_a_channel_whose_members_are_zero_can_go(name: str, regulariser: Any) -> None:
    """Sliced networks compute the same, so nothing reached a layer past the members."""
    make, inputs = TOPOLOGIES[name]
    model, x = make().double(), inputs()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, 0.3, 1.0)
    graph = ChannelGraph.trace(model, x)
    spaces = ChannelNorms(graph, regulariser).spaces
    dead = {space: torch.arange(space.size) % 3 == 1 for space in spaces if space.size > 1}
    silence(graph, regulariser, dead)
    before = outputs(model, x)
    importance = ChannelNorms(graph, regulariser).importance()
    for space, silent in dead.items():
        assert torch.equal(importance[space] == 0, silent)
    graph.reindex_spaces({space: (~silent).nonzero().flatten() for space, silent in dead.items()})
    assert_close(outputs(model, x), before, 1e-9)


class Past(Net):
    """A residual sum whose stem has no norm; a norm in the block and the head read it."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.norm = nn.Identity()
        self.block = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8))

    def body(self, x):
        return x + self.block(x)


class Gate(Net):
    """A gate that scales a norm's output, so a zero stays zero; after a sigmoid it does not."""

    def __init__(self, after_sigmoid: bool) -> None:
        super().__init__(8, 8)
        self.gate, self.after_sigmoid = conv(8, 8), after_sigmoid

    def body(self, x):
        gate = self.gate(x.mean((2, 3), keepdim=True))
        return (torch.sigmoid(x) if self.after_sigmoid else x) * gate


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (Past, ["block.2"]),  # the head would still see the stem's channels
        (lambda: Gate(False), ["stem"]),
        (lambda: Gate(True), []),
        (TOPOLOGIES["DenseBlock"][0], []),  # the head again
        (TOPOLOGIES["PreActivation"][0], ["blocks.0.2", "blocks.1.2"]),
        (TOPOLOGIES["Scaled"][0], []),
        (TOPOLOGIES["Functional"][0], []),
    ],
)
def test_channels_that_bypass_a_norm_are_left_alone(make: Any, wanted: list[str]) -> None:
    graph = ChannelGraph.trace(make().double(), INPUT)
    assert sorted(space.name for space in ChannelNorms(graph, "gamma_l1").spaces) == wanted


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "regnet_y_400mf"])
def test_a_squeeze_and_excitation_leaves_its_block_to_the_norms(name: str) -> None:
    graph = ChannelGraph.trace(network(name), torch.zeros(1, 3, 64, 64))
    spaces = ChannelNorms(graph, "gamma_l1").spaces
    left = [space.name for space in graph.spaces if space not in spaces]
    assert all(name.endswith("fc1") or name == "classifier.0" for name in left), left
    assert len(spaces) > 15


def test_frozen_members_are_left_alone() -> None:
    model = build(1, width=4)
    model.stages[0][0].branch[4].weight.requires_grad_(False)
    graph = trace(model)
    spaces = ChannelNorms(graph, "gamma_l1").spaces
    assert graph.space("stem.0") not in spaces
    assert graph.space("stages.0.0.branch.0") in spaces
    assert graph.space("stem.0") in ChannelNorms(graph, "group_lasso").spaces


def test_a_graph_without_members_has_nothing_to_shrink() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 2)).double()
    norms = ChannelNorms(trace(model), "gamma_l1")
    assert norms.spaces == []
    assert norms.importance() == {}
    norms.shrink(norms.per_channel({}))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_row_whose_new_half_does_not_learn_takes_half_a_step(optimizer: Any) -> None:
    """The old half is not held back, and its norm as a whole moves as far as its elements do on average."""
    model = nn.Sequential(conv(3, 4), conv(4, 6), nn.Flatten(), nn.Linear(6 * 64, 2))
    graph = ChannelGraph.trace(model, INPUT[:1, :, :8, :8].float())
    norms, steps = ChannelNorms(graph, "group_lasso"), optimizer(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    steps.step()
    before = norms.step_lengths(steps)
    weight = model[1].weight
    numbers = torch.zeros_like(weight, dtype=torch.int16)
    numbers[:, 2:], numbers[5] = 1, 1
    additions_of(steps).numbers[weight] = numbers
    additions_of(steps).set_factors({1: 0.0})
    (start,) = (sum(norms.lengths[:n]) for n, w in enumerate(norms.weights.values()) if w.tensor is weight)
    shares = torch.ones_like(before)
    shares[start : start + 6] = torch.tensor([0.5] * 5 + [0.0])
    torch.testing.assert_close(norms.step_lengths(steps), shares * before)
