"""Channels under weight norm: to pruning and growth they are the same as on a plain network of the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import INPUT, build, outputs, trace
from torch import nn
from torch.nn import functional as F
from weight_normed import folded, layers_of, normed, parts

import morphtrain
from morphtrain import options
from morphtrain.cost import count_params
from morphtrain.grow.net2deeper import insert_block_like
from morphtrain.grow.net2net import widen
from morphtrain.grow.size import params_at
from morphtrain.model import ResNet
from morphtrain.morph import MIXING, ChannelGraph
from morphtrain.morph.effective import effective
from morphtrain.norm.weight import initialise, to_weight_norm
from morphtrain.prune.channel_norms import ChannelNorms
from morphtrain.prune.fading import Fading
from morphtrain.prune.importance import Taylor, magnitude
from morphtrain.prune.lasso import GroupLasso, add_gradient, amount_of_step, group_lassos, penalty, shrink
from morphtrain.prune.reconfigure import reconfigure
from morphtrain.prune.weights import Normed, value_of


def pair() -> tuple[nn.Module, nn.Module, ChannelGraph, ChannelGraph]:
    """A network with weight norm, its plain twin, and their graphs."""
    model = normed(build(1, width=6))
    plain = folded(model)
    return model, plain, trace(model), trace(plain)


def assert_same_weights(model: nn.Module, plain: nn.Module, tolerance: float = 1e-12) -> None:
    for path, layer in plain.named_modules():
        if isinstance(layer, MIXING):
            found, wanted = effective(model.get_submodule(path)).detach(), layer.weight.detach()
            assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1), path
            assert torch.equal(found == 0, wanted == 0), path


def test_shrinking_takes_the_same_off_the_weight_and_leaves_the_norms_of_v() -> None:
    model, plain, graph, other = pair()
    lassos, plain_lassos = group_lassos(graph), group_lassos(other)
    lengths = [parts(layer)[1].flatten(1).norm(dim=1).clone() for layer in layers_of(model)]
    signs = [parts(layer)[0].sign() for layer in layers_of(model)]
    assert len(lassos) == len(plain_lassos) == len(layers_of(model))
    torch.testing.assert_close(penalty(lassos), penalty(plain_lassos))
    for amount in (0.1, 0.5, 1.0, 100.0):  # until rows and columns have gone, and at last all
        shrink(lassos, amount)
        shrink(plain_lassos, amount)
        assert_same_weights(model, plain)
    assert all(effective(layer).count_nonzero() == 0 for layer in layers_of(model)[:-1])
    for layer, length, sign in zip(layers_of(model), lengths, signs, strict=True):
        g, v = parts(layer)
        torch.testing.assert_close(v.flatten(1).norm(dim=1), length)
        assert bool(((g.sign() == sign) | (g == 0)).all())


def test_the_subgradient_is_that_of_the_weight() -> None:
    model, _, graph, _ = pair()
    lassos = group_lassos(graph)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    add_gradient(lassos, 0.7)
    for lasso, layer in zip(lassos, layers_of(model), strict=True):
        weight = effective(layer)
        rows, columns = weight.flatten(1).norm(dim=1).sum(), weight.transpose(0, 1).flatten(1).norm(dim=1).sum()
        value = 0.7 * (lasso.row_weight * rows + lasso.column_weight * columns)
        for part, grad in zip(parts(layer), torch.autograd.grad(value, parts(layer)), strict=True):
            torch.testing.assert_close(part.grad, 1 + grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_the_amount_of_a_step_is_what_the_optimizer_would_take_off(side: int) -> None:
    """Lengths of very different rows: what a small step along the penalty's gradient does to the groups' norms."""
    layer = nn.Sequential(nn.Conv2d(48, 24, 3)).double()
    to_weight_norm(layer)
    g, v = parts(layer[0])
    with torch.no_grad():
        g.mul_(torch.logspace(-1, 1, 24).view(g.shape))
    lasso = GroupLasso(Normed(g, v, 0), 1.0 - side, float(side))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    expected = amount_of_step(lasso, optimizer, 0.3)[side]
    dims = [d for d in range(4) if d != side]
    before = value_of(lasso.weight).pow(2).sum(dims).sqrt()
    taken = torch.zeros_like(before)
    for group in range(len(before)):  # one group's penalty at a time
        twin = copy.deepcopy(layer)
        twin[0].weight.pow(2).sum(dims)[group].sqrt().mul(0.3).backward()
        with torch.no_grad():
            for part in parts(twin[0]):
                part -= 1e-4 * part.grad
        taken[group] = (before - twin[0].weight.detach().pow(2).sum(dims).sqrt())[group]
    torch.testing.assert_close(torch.as_tensor(expected).to(taken).expand_as(taken), taken, rtol=0.05, atol=0)


def test_adam_and_lars_give_every_weight_an_amount() -> None:
    for optimizer in ("adamw", "lars"):
        config = morphtrain.compose(f"optimizer={optimizer}").optimizer
        model = normed(ResNet(blocks=1, width=4))
        stepping = options.build("optimizer", config, model=model)
        F.cross_entropy(model(INPUT.float()), torch.arange(4)).backward()
        stepping.step()
        for lasso in group_lassos(ChannelGraph.trace(model, INPUT[:1].float())):
            amounts = amount_of_step(lasso, stepping, 0.1)
            assert all(bool((torch.as_tensor(amount) > 0).all()) for amount in amounts)
            shrink([lasso], amounts)
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_group_lasso_of_channels_is_the_length() -> None:
    model, plain, graph, other = pair()
    norms, plain_norms = ChannelNorms(graph, "group_lasso"), ChannelNorms(other, "group_lasso")
    assert [space.name for space in norms.spaces] == [space.name for space in plain_norms.spaces]
    for found, wanted in zip(norms.importance().values(), plain_norms.importance().values(), strict=True):
        torch.testing.assert_close(found, wanted)
    amounts = torch.rand(sum(norms.sizes), dtype=torch.double)
    norms.shrink(amounts)
    plain_norms.shrink(amounts)
    assert_same_weights(model, plain)
    assert not ChannelNorms(graph, "gamma_l1").spaces


def test_importance_is_that_of_the_weight() -> None:
    model, plain, graph, other = pair()
    for found, wanted in zip(magnitude(graph).values(), magnitude(other).values(), strict=True):
        torch.testing.assert_close(found, wanted)
    measured = []
    for network, its in ((model, graph), (plain, other)):
        taylor = Taylor()
        F.cross_entropy(network(INPUT), torch.arange(4)).backward()
        taylor.look(its)
        taylor.count()
        measured.append(taylor.importance(its).values())
    for found, wanted in zip(*measured, strict=True):
        assert bool(wanted.isfinite().all())
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-14)


def test_what_fades_is_zero_in_the_end_and_the_rest_is_as_it_was() -> None:
    model, plain, graph, other = pair()
    gone = {name: torch.arange(graph.space(name).size) % 3 == 0 for name in ("stem.0", "stages.0.0.branch.0")}
    fadings = [Fading(its, {its.space(name): mask for name, mask in gone.items()}, 1.0) for its in (graph, other)]
    for left in (0.7, 0.3, 0.0):
        for fading in fadings:
            fading.fade(left)
        assert_same_weights(model, plain)
    before = outputs(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fadings[0].cut(optimizer)
    for found, wanted in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_what_lasso_has_made_zero_is_removed_and_the_function_stays() -> None:
    """Sliced against masked: of the channels and blocks that a strong penalty has emptied, in both modes."""
    model = ResNet(blocks=2, width=8).double().train()
    to_weight_norm(model)
    initialise(model, INPUT)
    graph = trace(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(40):
        F.cross_entropy(model(INPUT), torch.arange(4)).backward()
        optimizer.step()
        for lasso in group_lassos(graph):
            shrink([lasso], amount_of_step(lasso, optimizer, 0.5))
        optimizer.zero_grad()
    widths, before = {space.name: space.size for space in graph.spaces}, outputs(model)
    change = reconfigure(graph, threshold=1e-12, optimizer=optimizer)
    assert change.widths and sum(space.size for space in graph.spaces) < 0.8 * sum(widths.values())
    for found, wanted in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    F.cross_entropy(model(INPUT), torch.arange(4)).backward()
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


# -- growth: the function stays -------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_only", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_widening_keeps_the_function(mean_only: bool, noise: float) -> None:
    model = normed(build(2, width=6), mean_only)
    graph, before = trace(model), outputs(model)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert widen(graph, 1.5, noise=noise, generator=generator, optimizer=optimizer)
    for found, wanted in zip(outputs(model), before, strict=True):
        assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    for layer in layers_of(model)[1:]:
        columns = effective(layer).detach().transpose(0, 1).flatten(1)
        assert (len(columns.unique(dim=0)) == len(columns)) == (noise > 0), "only uneven shares tell copies apart"
    assert params_at(graph)({}) == count_params(model)


@pytest.mark.parametrize("mean_only", [False, True])
def test_new_layers_and_blocks_are_exactly_the_identity(mean_only: bool) -> None:
    model = normed(build(2, width=6), mean_only).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graph, before = trace(model), outputs(model)
    graph.insert_layer(graph.layer_places[0], [INPUT], optimizer=optimizer)
    for begin in ("zero_gamma", "half_half"):
        insert_block_like(graph, graph.stage_ends[0].path, [INPUT], begin, optimizer)
    for found, wanted in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    F.cross_entropy(model(INPUT), torch.arange(4)).backward()
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
