"""precision=dfp16: the quantiser against numpy, its gradients against those by hand, and runs that train in it."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from conftest import SMALL
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_host_sync import Reads
from test_resume import assert_same
from torch import nn
from torch.nn import functional as F
from whole_runs import trained_to_the_end

import morphtrain
from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.morph import ChannelGraph, format_of_model
from morphtrain.precision.fixed_point import QuantisedLayers, decode, encode, quantise, straight_through
from morphtrain.state import Run
from morphtrain.trainer import begin_epoch, build_run, start, train_epoch
from morphtrain.trainer.loop import evaluate

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
LARGEST = float(np.finfo(np.float32).max)


def by_numpy(x: NDArray[np.float32], bits: int = 16) -> tuple[NDArray[np.float64], int]:
    """Integers and the exponent of their unit as the paper has them, in 64 bits."""
    wide = x.astype(np.float64)
    largest = float(abs(wide).max(initial=0))
    if largest == 0:
        return 0 * wide, 0
    e = math.floor(math.log2(largest))
    e += (2.0 ** (e + 1) <= largest) - (2.0**e > largest)  # a logarithm is not exact
    limit = 2 ** (bits - 1) - 1
    return np.clip(np.rint(wide * 2.0 ** (bits - 2 - e)), -limit, limit), e - bits + 2


def values_of(integers: NDArray[np.float64], unit: int) -> NDArray[np.float32]:
    values = (integers * 2.0**unit).astype(np.float32)
    assert np.array_equal(values, integers * 2.0**unit), "32 bits hold them"
    return values


def quantised_by_numpy(x: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.from_numpy(values_of(*by_numpy(x.detach().numpy(), bits)))


def check_against_numpy(x: NDArray[np.float32], bits: int) -> None:
    integers, unit = by_numpy(x, bits)
    found, exponent = encode(torch.from_numpy(x), bits)
    assert np.array_equal(found.numpy().astype(np.float64), integers)
    assert np.array_equal(found.to(torch.int16).numpy(), integers)
    if integers.any():
        assert int(exponent) == unit
    wanted = values_of(integers, unit).view(np.int32)
    for values in (quantise(torch.from_numpy(x), bits), decode(found, exponent)):
        assert np.array_equal(values.numpy().view(np.int32), wanted)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(x=st.lists(NUMBERS, min_size=1, max_size=12), bits=st.sampled_from([16, 16, 12, 8, 3, 2]))
def test_it_is_numpys_bit_for_bit(x: list[float], bits: int) -> None:
    check_against_numpy(np.array(x, np.float32), bits)


@pytest.mark.parametrize(
    "x",
    [
        [0.0, -0.0],
        [1.0, *(k * 2.0**-15 for k in range(-9, 10))],  # halves of the unit: ties go to the even integer
        [2 - 2.0**-23, -2 + 2.0**-23, 2 - 2.0**-14, 2 - 2.0**-15],  # would be 32768
        [1.0], [-1.0], [2 - 2.0**-23], [0.5, -1.0],
        [LARGEST, -LARGEST, 1.0], [LARGEST / 2, 1e30], [2.0**127],
        [2.0**-149], [3 * 2.0**-149, 2.0**-149], [1e-40, -2e-42, 2.0**-126], [2.0**-113, 2.0**-114],
    ],
)  # fmt: skip
def test_ties_clamps_zeros_and_the_ends_of_the_range(x: list[float]) -> None:
    check_against_numpy(np.array(x, np.float32), 16)


def test_random_tensors_of_every_scale() -> None:
    rng = np.random.default_rng(0)
    for exponent in range(-148, 127, 5):
        check_against_numpy(np.ldexp(rng.normal(size=1000).clip(-1.9, 1.9), exponent).astype(np.float32), 16)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_is_quantised_stays(rounding: str) -> None:
    for bits in (16, 8, 2):
        once = quantise(torch.randn(1000) * 3, bits, rounding)
        for again in ("nearest", "stochastic"):
            assert torch.equal(quantise(once, bits, again), once)


def test_stochastic_rounding_is_unbiased() -> None:
    """Each value's mean lies within four standard errors, which are known; none moves further than to a neighbour."""
    draws, unit = 20_000, 2.0**-14
    x = torch.cat([torch.tensor([1.75]), torch.rand(63, generator=torch.Generator().manual_seed(1)) * 2 - 1])
    found = quantise(x.expand(draws, -1), 16, "stochastic", torch.Generator().manual_seed(2)).double()
    fraction = x.double() / unit - (x.double() / unit).floor()
    error = unit * (fraction * (1 - fraction) / draws).sqrt()
    assert ((found.mean(0) - x.double()).abs() <= 4 * error).all()
    assert (error[1:] > 0).sum() > 50
    below = (x.double() / unit).floor() * unit
    assert ((found == below) | (found == below + unit)).all()
    assert torch.equal(found[:, 0], torch.full((draws,), 1.75, dtype=torch.double))


def test_whole_numbers_are_never_rounded_up() -> None:
    """A random number added to a large one is rounded itself: nine bits are left for the fraction."""
    x = torch.arange(16384, 32768, dtype=torch.float32).repeat(8)
    assert torch.equal(quantise(x, 16, "stochastic", torch.Generator().manual_seed(0)), x)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen(wrong: float) -> None:
    assert quantise(torch.tensor([1.0, wrong, 0.0])).isnan().all()
    assert encode(torch.tensor([1.0, wrong, 0.0]), rounding="stochastic")[0].isnan().all()


def test_shape_type_and_format_are_kept_and_nothing_is_read() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    before = x.clone()
    with Reads() as reads:
        found = quantise(x)
        quantise(x, rounding="stochastic")
    assert reads.found == []
    assert found.stride() == x.stride() and torch.equal(x, before)
    assert torch.equal(quantise(x.contiguous()), found)
    assert quantise(torch.zeros(0, 3)).shape == (0, 3)
    assert quantise(torch.tensor(0.3)).shape == ()
    assert quantise(torch.ones(3, 1).expand(3, 4)).shape == (3, 4)
    for dtype in (torch.bfloat16, torch.float16):
        assert quantise(x.to(dtype)).dtype is dtype
        torch.testing.assert_close(quantise(x.to(dtype)), x.to(dtype), rtol=0, atol=2.0**-13)


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"bits": 17}, {"rounding": "up"}])
def test_other_bits_and_roundings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="2 to 16 bits, and nearest or stochastic, work"):
        quantise(torch.ones(2), **wrong)


class Net(nn.Module):
    """A convolution whose output is changed in place, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3 * 4 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.conv(x), inplace=True).flatten(1))


@pytest.mark.parametrize("bits", [8, 5])
def test_layers_and_their_gradients_are_those_by_hand(bits: int) -> None:
    torch.manual_seed(3)
    net, x, y = Net(), torch.randn(6, 2, 6, 6, requires_grad=True), torch.randint(5, (6,))
    with QuantisedLayers(bits):
        logits = net(x)
        loss = F.cross_entropy(logits, y)
    loss.backward()

    def q(tensor: torch.Tensor) -> torch.Tensor:
        return quantised_by_numpy(tensor, bits)

    with torch.no_grad():
        before = F.conv2d(q(x), q(net.conv.weight), net.conv.bias)
        hidden = before.relu().flatten(1)
        out = F.linear(q(hidden), q(net.head.weight), net.head.bias)
        of_out = q((out.softmax(1) - F.one_hot(y, 5)) / len(y))
        of_hidden = of_out @ q(net.head.weight)
        of_conv = q(of_hidden.view_as(before) * (before > 0))
    wanted = {
        "conv.weight": nn.grad.conv2d_weight(q(x), net.conv.weight.shape, of_conv),
        "conv.bias": of_conv.sum((0, 2, 3)),
        "head.weight": of_out.T @ q(hidden),
        "head.bias": of_out.sum(0),
    }
    torch.testing.assert_close(logits, out, rtol=1e-5, atol=1e-6)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(x.grad, nn.grad.conv2d_input(x.shape, q(net.conv.weight), of_conv))
    plain = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    apart = [(p.grad - g).norm() / g.norm() for p, g in zip(net.parameters(), plain, strict=True)]
    assert min(apart) > 2.0 ** -(bits + 3), "the rounding shows"


def test_computed_weights_are_quantised_and_what_they_are_computed_from_learns() -> None:
    torch.manual_seed(0)
    conv, x = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), torch.randn(4, 2, 6, 6)
    with QuantisedLayers(6):
        found = conv(x)
    wanted = F.conv2d(quantised_by_numpy(x, 6), quantised_by_numpy(conv.weight, 6), conv.bias)
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in conv.parameters())


class Functional(nn.Module):
    """A network that calls its layers as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, self.conv.weight, self.conv.bias).relu()
        return F.linear(x.mean((2, 3)), self.head.weight, self.head.bias)


@pytest.mark.parametrize("network", [Net, Functional])
def test_a_trace_is_as_without_it(network: type[nn.Module]) -> None:
    """Growth follows the channels anew within the context in which it measures."""
    net, x = network(), torch.zeros(1, 2, 6, 6)
    with QuantisedLayers(2, "stochastic"):
        inside = ChannelGraph.trace(net, x)
    outside = ChannelGraph.trace(net, x)
    assert [(space.name, space.size) for space in inside.spaces] == [(s.name, s.size) for s in outside.spaces]
    assert inside.spaces


def test_an_evaluation_is_no_matter_of_luck() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 2, 6, 6)
    with QuantisedLayers(6):
        nearest = net(x)
    state = torch.get_rng_state()
    with QuantisedLayers(6, "stochastic"), torch.no_grad():
        assert torch.equal(net(x), nearest)
    assert torch.equal(torch.get_rng_state(), state)
    with QuantisedLayers(6, "stochastic"):
        assert not torch.equal(net(x), net(x))
    assert not torch.equal(torch.get_rng_state(), state)


def test_gradients_of_gradients_pass_straight_through() -> None:
    x = torch.tensor([0.3, -1.7], requires_grad=True)
    (gradient,) = torch.autograd.grad((straight_through(x, 4) ** 3).sum(), x, create_graph=True)
    assert torch.equal(gradient, 3 * quantise(x.detach(), 4) ** 2)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert torch.equal(second, 6 * quantise(x.detach(), 4))


DENSE = [override for override in SMALL if not override.startswith("prune")]
QUIET = ("tracking=none", "device=cpu")


@pytest.mark.parametrize(
    "options",
    [
        ("memory_format=channels_last", "norm=ghost", "norm.ghost_batch_size=5", "batch_policy.max_micro_batch=12"),
        ("precision.rounding=stochastic", "grow=deeper", "grow.at_epochs=[2]", "grow.operator=layer"),
    ],
)
def test_a_run_in_it_learns_shrinks_and_grows(options: tuple[str, ...]) -> None:
    keys = {option.split("=")[0] for option in options}
    own = [override for override in SMALL if override.split("=")[0] not in keys]
    run = trained_to_the_end(morphtrain.compose(*own, *QUIET, "precision=dfp16", *options))
    first, last = run.history[0], run.history[-1]
    assert last["train_loss"] < 0.5 * first["train_loss"]
    assert last["val_accuracy"] > 0.5, "of ten classes"
    sizes = [record["params"] for record in run.history]
    assert sizes[-1] < max(sizes) and (sizes[0] < max(sizes)) == ("grow=deeper" in options)
    assert all(parameter.dtype is torch.float32 for parameter in run.model.parameters())
    if "memory_format=channels_last" in options:
        assert format_of_model(run.model) is torch.channels_last


def test_steps_and_evaluation_of_a_run_are_in_it() -> None:
    def run_of(*overrides: str) -> Run:
        run = build_run(morphtrain.compose(*DENSE, *QUIET, *overrides))
        start(run)
        return run

    plain, coarse = run_of(), run_of("precision=dfp16", "precision.bits=4")
    loss, accuracy = evaluate(coarse)
    with QuantisedLayers(4):
        assert evaluate(plain) == (loss, accuracy)
    assert evaluate(plain)[0] != loss
    for run in (plain, coarse):
        begin_epoch(run)
    by_hand = copy.deepcopy(plain.model.state_dict())
    train_epoch(coarse)
    with QuantisedLayers(4):
        train_epoch(plain)
    assert_same(coarse.model.state_dict(), plain.model.state_dict())
    assert any(not torch.equal(value, by_hand[name]) for name, value in plain.model.state_dict().items())


@pytest.mark.parametrize(
    ("other", "options"),
    {
        "compile=default": ["compile=default"],
        "batch_policy=fill_memory": ["batch_policy=fill_memory", "batch_policy.budget=1GiB"],
        "prune.round_to=auto": ["prune=prunetrain", "prune.round_to=auto"],
        "prune.cost=latency": ["prune=morphnet", "prune.cost=latency"],
        "grow.cost=latency": ["prune=prunetrain", "prune.stop_epoch=10", "grow=morphnet", "grow.cost=latency"],
    }.items(),
)
def test_what_it_does_not_go_together_with_is_one_line(other: str, options: list[str]) -> None:
    morphtrain.compose(*options)
    with pytest.raises(UserError, match=rf"^precision=dfp16 with {other}: [^\n]* works$"):
        morphtrain.compose("precision=dfp16", *options)


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("precision.bits=1", "2 to 16"),
        ("precision.bits=17", "2 to 16"),
        ("precision.rounding=up", "one of nearest"),
    ],
)
def test_keys_out_of_range_are_named(key: str, wanted: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: must be {wanted}"):
        morphtrain.compose("precision=dfp16", key)


def test_the_largest_batch_in_it_is_not_estimated() -> None:
    with initialize_config_dir(str(schema.CONF)):
        composed = compose("maxbatch", overrides=["precision=dfp16", "budget=1GiB"])
    with pytest.raises(UserError, match="precision=dfp16: must be another option: its emulation takes more memory"):
        schema.parse_max_batch(composed)
