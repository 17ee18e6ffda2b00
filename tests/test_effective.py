"""Weights as the layers use them, plain or computed: set, scaled, folded, drawn again."""

from __future__ import annotations

import copy

import pytest
import torch
from computed_layers import (
    WRAPS,
    Net,
    Wrap,
    X,
    derived,
    made,
    shared_computation,
)
from test_resume import assert_same
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from morphtrain.initialise import fresh_weights
from morphtrain.morph import ChannelGraph, MorphError
from morphtrain.morph.effective import assign, effective, fold, parameters_of, scale, sensitivity


def test_assigned_weights_keep_the_norms_of_v_and_the_signs_of_g() -> None:
    layer = weight_norm(nn.Conv2d(3, 4, 3)).double()
    g, v = parameters_of(layer)
    with torch.no_grad():
        g[1] *= -1
        v[2] *= 3
    norms = v.flatten(1).norm(dim=1)
    wanted = torch.randn(4, 3, 3, 3, dtype=torch.double)
    wanted[3] = 0
    direction = v[3].clone()
    assign(layer, "weight", wanted)
    assert torch.allclose(effective(layer), wanted, rtol=0, atol=1e-14) and bool((effective(layer)[3] == 0).all())
    assert torch.allclose(v.flatten(1).norm(dim=1), norms) and torch.equal(v[3], direction)
    assert g.flatten().sign().tolist() == [1, -1, 1, 0]


def test_what_spectral_norm_cannot_give_is_refused_and_nothing_is_changed() -> None:
    layer = spectral_norm(nn.Conv2d(3, 4, 3)).double()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(MorphError, match="computed by SpectralNorm, cannot be set to this one"):
        assign(layer, "weight", 2 * effective(layer))
    assert_same(layer.state_dict(), before)


@pytest.mark.parametrize("name", WRAPS)
def test_scaled_weights_are_scaled(name: str) -> None:
    torch.manual_seed(0)
    layer = WRAPS[name](nn.Conv2d(4, 5, 3).double()).double()
    factor = (torch.rand(5, 4, 1, 1) * (torch.rand(5, 4, 1, 1) > 0.3)).double()
    wanted = effective(layer).detach() * factor
    scale(layer, "weight", factor)
    assert torch.allclose(effective(layer), wanted, rtol=0, atol=1e-14)
    assert torch.equal(effective(layer) == 0, wanted == 0)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_the_derivative_by_factors_on_a_normed_weight(dim: int | None) -> None:
    torch.manual_seed(0)
    layer = weight_norm(nn.Conv2d(3, 4, 3).double(), dim=dim)
    assert sensitivity(layer) is None
    layer(X).square().sum().backward()
    factor = torch.ones(4, 3, 3, 3, dtype=torch.double, requires_grad=True)
    F.conv2d(X, effective(layer).detach() * factor, layer.bias).square().sum().backward()
    assert torch.allclose(sensitivity(layer), factor.grad, rtol=1e-10)


def test_folding_leaves_copies_alone_and_tied_weights_tied() -> None:
    model = shared_computation(None).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.double)
    other = copy.deepcopy(model)
    expected = model(x)
    fold(model)
    assert type(model[0]) is nn.Conv2d and model[0].weight is model[1].weight
    assert torch.allclose(model(x), expected, rtol=1e-12)
    assert torch.allclose(other(x), expected, rtol=1e-12) and len(list(other.parameters())) == 4
    assert {name for name, _ in model.named_parameters()} == {"0.weight", "0.bias", "1.bias"}


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm], ids=["weight norm", "spectral norm"])
def test_fresh_weights_are_those_of_a_plain_network(wrap: Wrap) -> None:
    model, plain = made(wrap), made(lambda layer: layer)
    for network in (model, plain):
        torch.manual_seed(1)
        fresh_weights(network)
    for path in ("stem", "a", "grouped", "up", "head"):
        layer, wanted = model.get_submodule(path), plain.get_submodule(path).weight
        if wrap is weight_norm:
            assert torch.allclose(effective(layer), wanted, rtol=1e-12)
        else:
            sigma = wanted / effective(layer)
            assert torch.allclose(sigma, sigma.flatten()[0].expand_as(sigma), rtol=1e-10)


@pytest.mark.parametrize("value", [float("nan"), 0.0, 1e-30, 3e38])
@pytest.mark.parametrize("name", [*WRAPS, "spectral norm", "derived"])
def test_what_can_change_does_not_depend_on_values(name: str, value: float) -> None:
    """A resumed run is traced before it has its values."""
    torch.manual_seed(0)
    wrap = {**WRAPS, "spectral norm": spectral_norm, "derived": derived}[name]
    model = Net(wrap)
    wanted = [(repr(s), s.is_ambiguous) for s in ChannelGraph.trace(model, X.float()).spaces]
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(value)
    graph = ChannelGraph.trace(model, X.float())
    assert [(repr(s), s.is_ambiguous) for s in graph.spaces] == wanted and len(wanted) == 5
