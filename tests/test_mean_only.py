"""Batch norm that takes away the mean and leaves the scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import INPUT, build, check_surgery
from torch import nn
from weight_normed import normed

from morphtrain.norm.mean_only import MeanOnlyBatchNorm
from morphtrain.settling import settle, trained_norms


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (6, 3), (6, 3, 7)])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_a_mean_only_norm_equals_numpy(shape: tuple[int, ...], momentum: float | None) -> None:
    norm = MeanOnlyBatchNorm(3, momentum=momentum).double()
    nn.init.normal_(norm.bias)
    axes, channels = (0, *range(2, len(shape))), (1, 3, *[1] * (len(shape) - 2))
    running = np.zeros(3)
    bias = norm.bias.detach().numpy().reshape(channels)
    for number in range(1, 4):
        x = (number + torch.randn(shape)).double().requires_grad_()
        values, drawn = x.detach().numpy(), torch.randn(shape).double()
        mean = values.mean(axes)
        share = 1 / number if momentum is None else momentum
        running = (1 - share) * running + share * mean
        y = norm(x)
        np.testing.assert_allclose(y.detach().numpy(), values - mean.reshape(channels) + bias, atol=1e-12)
        np.testing.assert_allclose(norm.running_mean.numpy(), running, atol=1e-12)
        (grad, of_bias) = torch.autograd.grad((y * drawn).sum(), [x, norm.bias])
        weights = drawn.numpy()  # dL/dx = w - mean(w), as each value is in the mean of all
        np.testing.assert_allclose(grad.numpy(), weights - weights.mean(axes, keepdims=True), atol=1e-12)
        np.testing.assert_allclose(of_bias.numpy(), weights.sum(axes), atol=1e-12)
    x = torch.randn(shape).double()
    wanted = x.numpy() - running.reshape(channels) + bias
    np.testing.assert_allclose(norm.eval()(x).detach().numpy(), wanted, atol=1e-12)
    assert set(norm.state_dict()) == {"bias", "running_mean", "num_batches_tracked"}


def test_a_mean_only_norm_in_16_bits_rounds_once() -> None:
    norm, x = MeanOnlyBatchNorm(4), (100 + torch.randn(64, 4, 8, 8)).bfloat16()
    y = norm(x)
    assert y.dtype is torch.bfloat16
    exact = x.double() - x.double().mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)  # a mean in 16 bits would be off by 0.25


def test_a_mean_only_norm_takes_no_single_value() -> None:
    norm = MeanOnlyBatchNorm(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 3, 1, 1))
    norm.eval()(torch.randn(1, 3, 1, 1))


def test_its_running_mean_is_settled_and_its_channels_are_followed() -> None:
    model = normed(build(2, width=8), mean_only=True).train()
    batches = [torch.randn(12, 3, 8, 8).double() for _ in range(3)]
    settle(model, trained_norms(model), batches)
    first = model.stem[1].running_mean
    outs = [model.stem[0](images).mean((0, 2, 3)) for images in batches]
    torch.testing.assert_close(first, torch.stack(outs).mean(0).detach())
    graph = check_surgery(model, (INPUT,), 1e-8)
    norms = {
        axis.path
        for space in graph.spaces
        for slot in space.slots
        if isinstance((axis := slot.axis).module, MeanOnlyBatchNorm)
    }
    assert len(norms) == len(trained_norms(model.train()))
