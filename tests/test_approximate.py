"""Approximate gradients of weights: loops are the oracle; what is not approximated stays bit by bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from test_resume import assert_same
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from morphtrain.gradient import ApproximateGradients

SIGMAS = 4.5  # standard errors that a mean of random numbers may be off
LAST = torch.channels_last


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.double) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(dtype)


def passed(
    model: nn.Module, x: torch.Tensor, context: AbstractContextManager[Any], autocast: bool = False
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The output for `x`, the gradient of `x`, and those of the parameters, for fixed gradients of the output."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with context, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    y.backward(upstream(y))
    return y.detach(), x.grad, {name: p.grad for name, p in model.named_parameters()}


def upstream(y: torch.Tensor) -> torch.Tensor:
    return draw(*y.shape, seed=1, dtype=y.dtype)


# -- approximate: what stays exact ------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(3, 4, 3), (5, 3, 6, 7)),
    "strided": (nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 2)), (5, 3, 8, 7)),
    "dilated": (nn.Conv2d(3, 4, 3, padding=2, dilation=(2, 3)), (5, 3, 7, 8)),
    "same": (nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2), bias=False), (5, 3, 7, 6)),
    "valid": (nn.Conv2d(3, 4, 2, padding="valid"), (5, 3, 4, 4)),
    "groups": (nn.Conv2d(6, 4, 3, groups=2, padding=1), (5, 6, 5, 5)),
    "depthwise": (nn.Conv2d(3, 6, 3, groups=3, stride=2), (5, 3, 7, 7)),
    "reflecting": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (5, 3, 5, 6)),
    "1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (5, 3, 9)),
    "3d": (nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1), stride=(1, 1, 2)), (3, 2, 3, 4, 5)),
}
for _layer, _ in LAYERS.values():
    _layer.double()
    for _seed, _parameter in enumerate(_layer.parameters()):
        _parameter.data.copy_(draw(*_parameter.shape, seed=_seed))


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.double], ids=["float", "double"])
@pytest.mark.parametrize("kind", ["zero", "top1", "random"])
def test_what_a_layer_gives_and_the_gradient_of_its_input_stay_bit_by_bit(
    kind: str, dtype: torch.dtype, last: bool
) -> None:
    for name, (made, shape) in LAYERS.items():
        if last and len(shape) != 4:
            continue
        layer, x = copy.deepcopy(made).to(dtype), draw(*shape, dtype=dtype)
        if last:
            layer, x = layer.to(memory_format=LAST), x.to(memory_format=LAST)
        y, dx, grads = passed(layer, x, ApproximateGradients(kind, every=1))
        exact_y, exact_dx, exact = passed(layer, x, nullcontext())
        assert torch.equal(y, exact_y) and y.stride() == exact_y.stride(), name
        assert torch.equal(dx, exact_dx) and dx.stride() == exact_dx.stride(), name
        assert grads["weight"].stride() == exact["weight"].stride(), name
        if "bias" in exact:
            torch.testing.assert_close(grads["bias"], exact["bias"], msg=name)
        assert not torch.allclose(grads["weight"], exact["weight"]), name
        if kind == "zero":
            assert not grads["weight"].any(), name


class Net(nn.Module):
    """Convolutions of several kinds, with an output that is overwritten, a frozen one, and one in code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.free = nn.Parameter(draw(5, 4, 3, 3))
        self.frozen, self.up = nn.Conv2d(5, 5, 3, padding=1).requires_grad_(False), nn.ConvTranspose2d(5, 5, 3)
        self.d, self.head = nn.Conv2d(5, 6, 3), nn.Linear(6, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x), inplace=True)
        x = F.relu(self.c(self.b(x)), inplace=True)
        x = F.conv2d(x, self.free, padding=1)
        with torch.no_grad():
            self.d(x)  # a pass that nothing is learnt from has a place in the order, too
        return self.head(self.d(self.up(self.frozen(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("every", "chosen"),
    [(1, ["a.weight", "c.weight", "free", "d.weight"]), (2, ["c.weight", "d.weight"]), (3, ["free", "d.weight"])],
)
def test_every_so_many_convolutions_with_a_larger_kernel_are_chosen_in_the_order_of_their_calls(
    every: int, chosen: list[str]
) -> None:
    """a, c, free, frozen, d (without gradients), d."""
    torch.manual_seed(0)
    model, x, context = Net(), draw(4, 3, 9, 9), ApproximateGradients("zero", every)
    y, dx, exact = passed(model, x, nullcontext())
    for _ in range(2):  # each pass counts from zero
        *outer, grads = passed(model, x, context)
        assert torch.equal(outer[0], y) and torch.equal(outer[1], dx)
        assert context.chosen == len(chosen)
        assert sorted(name for name, grad in grads.items() if grad is not None and not grad.any()) == sorted(chosen)
        for name, grad in grads.items():
            if exact[name] is None:
                assert grad is None, name
            elif name not in chosen:
                same = torch.allclose if name.endswith("bias") else torch.equal
                assert same(grad, exact[name]), name


def test_single_images_without_a_batch_stay_exact() -> None:
    layer = copy.deepcopy(LAYERS["plain"][0])
    grads = [passed(layer, draw(3, 6, 7), context)[2] for context in (nullcontext(), ApproximateGradients(every=1))]
    assert_same(*grads)


class Masks(TorchDispatchMode):
    """Which of the gradients of input, weight and bias convolutions are asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Sequence[bool]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ == "convolution_backward":
            self.found.append(tuple(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["zero", "top1", "random"])
def test_the_gradient_of_the_weight_is_not_computed(kind: str) -> None:
    """Nor that of the bias, which oneDNN would compute together with it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).double()
    with Masks() as masks:
        passed(model, draw(2, 3, 9, 9), ApproximateGradients(kind))
    assert masks.found == [(True, True, True), (True, False, False), (True, True, True)], "from the last to the first"


# -- approximate: patches ---------------------------------------------------------------------------------------------


def by_loop(layer: Any, x: torch.Tensor, grad: torch.Tensor, places: np.ndarray) -> np.ndarray:
    """The sum over images of a patch of the input times the sum of a channel's gradient, entry by entry."""
    dims = x.dim() - 2
    if layer.padding == "same":
        more = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pads = [(m // 2, m - m // 2) for m in more]
    else:
        pads = [(p, p) for p in ((0,) * dims if layer.padding == "valid" else layer.padding)]
    mode = {"mode": "reflect"} if layer.padding_mode == "reflect" else {}
    padded = np.pad(x.double().numpy(), [(0, 0), (0, 0), *pads], **mode)
    result = np.zeros(layer.weight.shape)
    per_group, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    for image in range(len(x)):
        for channel in range(layer.out_channels):
            place = np.unravel_index(places[image, channel], grad.shape[2:])
            first = channel // per_group * inputs
            for entry in np.ndindex(*layer.kernel_size):
                pixel = tuple(
                    int(p) * s + e * d for p, s, e, d in zip(place, layer.stride, entry, layer.dilation, strict=True)
                )
                patch = padded[(image, slice(first, first + inputs), *pixel)]
                result[(channel, slice(None), *entry)] += grad[image, channel].double().sum().item() * patch
    return result


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_patches_are_those_of_a_loop(name: str, last: bool) -> None:
    layer, shape = LAYERS[name]
    x = draw(*shape)
    if last:
        if x.dim() != 4:
            pytest.skip("images only")
        layer, x = copy.deepcopy(layer).to(memory_format=LAST), x.to(memory_format=LAST)
    y, _, grads = passed(layer, x, ApproximateGradients("top1", every=1))
    grad = upstream(y)
    places = grad.flatten(2).abs().numpy().argmax(2)
    np.testing.assert_allclose(grads["weight"].numpy(), by_loop(layer, x, grad, places), rtol=1e-10, atol=1e-12)
    seeded = torch.Generator().manual_seed
    _, _, grads = passed(layer, x, ApproximateGradients("random", every=1, generator=seeded(5)))
    places = torch.randint(grad.flatten(2).shape[2], grad.shape[:2], generator=seeded(5)).numpy()
    np.testing.assert_allclose(grads["weight"].numpy(), by_loop(layer, x, grad, places), rtol=1e-10, atol=1e-12)


def test_patches_are_drawn_from_all_places_alike() -> None:
    """The first entry of a channel's gradient is the pixel where its patch begins; all pixels differ."""
    layer = nn.Conv2d(1, 3600, 2, bias=False).double()
    x = torch.arange(16.0, dtype=torch.double).view(1, 1, 4, 4)
    with ApproximateGradients("random", every=1, generator=torch.Generator().manual_seed(0)):
        layer(x).mean((2, 3)).sum().backward()
    pixels, counts = layer.weight.grad[:, 0, 0, 0].round().unique(return_counts=True)
    assert pixels.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert all(abs(count - 400) < SIGMAS * math.sqrt(3600 * (1 / 9) * (8 / 9)) for count in counts.tolist())


@pytest.mark.parametrize("kind", ["zero", "top1", "random"])
def test_in_bfloat16_gradients_are_those_of_what_autocast_computes(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 8, 3, padding=1), draw(20, 3, 8, 8, dtype=torch.float32)
    seeded = torch.Generator().manual_seed
    y, dx, grads = passed(layer, x, ApproximateGradients(kind, every=1, generator=seeded(5)), autocast=True)
    exact_y, exact_dx, exact = passed(layer, x, nullcontext(), autocast=True)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, exact_y) and torch.equal(dx, exact_dx)
    assert grads["weight"].dtype is grads["bias"].dtype is torch.float32
    torch.testing.assert_close(grads["bias"], exact["bias"], rtol=2e-2, atol=2e-2)
    if kind == "zero":
        assert not grads["weight"].any()
        return
    grad = upstream(y)
    places = grad.flatten(2).abs().argmax(2)  # several may be the largest
    if kind == "random":
        places = torch.randint(64, (20, 8), generator=seeded(5))
    loop = by_loop(layer, x.bfloat16(), grad, places.numpy())
    np.testing.assert_allclose(grads["weight"].numpy(), loop, atol=0.02 * abs(loop).max())


# -- approximate: in a step -------------------------------------------------------------------------------------------


def test_without_a_gradient_momentum_and_weight_decay_go_on() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3).double(), draw(5, 3, 6, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    before = layer.weight.detach().clone()
    passed(layer, x, nullcontext())
    momentum = layer.weight.grad + 0.05 * before
    optimizer.step()
    middle = layer.weight.detach().clone()
    torch.testing.assert_close(middle, before - 0.1 * momentum)
    passed(layer, x, ApproximateGradients("zero", every=1))
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), middle - 0.1 * (0.9 * momentum + 0.05 * middle))


def test_a_weight_that_is_computed_gets_its_part() -> None:
    torch.manual_seed(0)
    model = weight_norm(nn.Conv2d(3, 4, 3)).double()
    _, dx, exact = passed(model, draw(5, 3, 6, 6), nullcontext())
    for kind in ("zero", "top1"):
        _, dx_too, grads = passed(model, draw(5, 3, 6, 6), ApproximateGradients(kind, every=1))
        assert torch.equal(dx_too, dx)
        assert grads.keys() == exact.keys() and len(grads) == 3
        assert all(bool(grad.any()) == (kind == "top1" or "bias" in name) for name, grad in grads.items())
