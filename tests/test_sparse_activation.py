"""Sparse gradients at the outputs of convolutions: numpy and scipy are the oracles."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from test_approximate import LAST, SIGMAS, draw, passed, upstream
from torch import nn
from torch.nn import functional as F

from morphtrain.cost import count_macs
from morphtrain.gradient import SparseGradients, sparse_activation, sparsified


def threshold(gradient: np.ndarray, p: float) -> float:
    return float(stats.norm.ppf((1 + p) / 2) * math.sqrt(math.pi / 2) * np.abs(gradient).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.double, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_sparse_gradients_have_the_same_mean(p: float, dtype: torch.dtype) -> None:
    """Over 10000 draws; what is at or above the threshold stays, what is below becomes zero or the threshold."""
    g, number = draw(24, dtype=dtype), 10000
    draws = sparsified(g.expand(number, -1), p, torch.Generator().manual_seed(1))
    assert draws.dtype is dtype
    tau = float(torch.tensor(threshold(g.double().numpy(), p), dtype=torch.double).to(dtype))
    small = g.abs() < tau
    assert small.any()
    assert torch.equal(draws[:, ~small], g[~small].expand(number, -1))
    kept = draws[:, small]
    sizes = kept.abs().double().unique()
    assert len(sizes) == 2 and sizes[0] == 0
    assert sizes[1].item() == pytest.approx(tau, rel=4 * torch.finfo(dtype).eps)
    assert ((kept == 0) | (kept.sign() == g[small].sign())).all()
    size = g[small].double().abs()
    errors = (size * (sizes[1] - size) / number).sqrt()  # of the means
    assert ((kept.double().mean(0) - g[small].double()).abs() <= 4 * errors + 1e-12).all()


@pytest.mark.parametrize(("p", "known"), [(0.5, 0.26), (0.9, 0.54), (0.99, 0.69)])
def test_the_share_of_zeros_is_that_predicted_for_normal_gradients(p: float, known: float) -> None:
    """By numerical integration: below tau, zero has the chance 1 - |g| / tau."""
    tau = stats.norm.ppf((1 + p) / 2)
    predicted = 2 * integrate.quad(lambda size: (1 - size / tau) * stats.norm.pdf(size), 0, tau)[0]
    assert predicted == pytest.approx(known, abs=0.01)
    g = 0.003 * draw(10**6)
    found = (sparsified(g, p, torch.Generator().manual_seed(1)) == 0).double().mean().item()
    error = math.sqrt(predicted * (1 - predicted) / 10**6)
    assert abs(found - predicted) < 0.002 + SIGMAS * error, "tau follows the mean of these numbers"


def test_zeros_stay_and_what_has_overflowed_is_found_out() -> None:
    """A loss scale looks for values that are not finite; a zero would hide them."""
    assert not sparsified(torch.zeros(5), 0.9).any()
    for bad in (math.inf, -math.inf, math.nan):
        assert not sparsified(torch.tensor([1.0, bad, 2.0]), 0.9).isfinite().all()
    assert sparsified(torch.full((8,), 6e4, dtype=torch.half), 0.5).isfinite().all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_sparse_gradients_keep_the_memory_format(memory_format: torch.memory_format) -> None:
    g = draw(2, 3, 4, 5).to(memory_format=memory_format)
    assert sparsified(g, 0.9).stride() == g.stride()


def test_the_layers_learn_from_the_sparse_gradients() -> None:
    """The gradients of input and weight are those of a convolution whose output has the sparse gradient."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3, padding=1).double(), draw(5, 3, 6, 6)
    seeded = torch.Generator().manual_seed
    y, dx, grads = passed(layer, x, SparseGradients(0.9, seeded(3)))
    exact_y, _, _ = passed(layer, x, nullcontext())
    assert torch.equal(y, exact_y)
    sparse = sparsified(upstream(y), 0.9, seeded(3))
    assert 0.4 < (sparse == 0).double().mean() < 0.7
    torch.testing.assert_close(dx, F.grad.conv2d_input(x.shape, layer.weight, sparse, padding=1))
    torch.testing.assert_close(grads["weight"], F.grad.conv2d_weight(x, layer.weight.shape, sparse, padding=1))
    torch.testing.assert_close(grads["bias"], sparse.sum((0, 2, 3)))


def test_what_zeros_would_save_is_their_share_of_the_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients that are zero in every other image, half of what the convolutions take, of all."""
    halves = torch.tensor([0, 1, 0, 1]).view(4, 1, 1, 1)
    monkeypatch.setattr(sparse_activation, "sparsified", lambda gradient, p, generator: gradient * halves)
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2, groups=2))
    model = nn.Sequential(*body, nn.ConvTranspose2d(6, 5, 2), nn.Flatten(), nn.Linear(5 * 5 * 5, 3))
    first, second = (count_macs(body[:number], (3, 9, 9)) for number in (1, 3))
    rest = count_macs(model, (3, 9, 9)) - second
    with SparseGradients(0.9) as sparse:
        y = model(draw(4, 3, 9, 9, dtype=torch.float32))  # the first layer computes no gradient of the images
    y.sum().backward()
    zeros, saved = sparse.tally.shares()
    assert zeros == 0.5
    of_convolutions = first + 2 * (second - first)
    assert saved == pytest.approx(0.5 * of_convolutions / (of_convolutions + 2 * rest))
