"""Cheaper gradients: loops, numpy and scipy are the oracles; what is not approximated stays bit by bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from scipy import integrate, stats
from test_layer_calls import Scaled
from test_resume import assert_same
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from whole_runs import trained_to_the_end

import morphtrain
from morphtrain.cost import count_macs
from morphtrain.errors import UserError
from morphtrain.gradient import ApproximateGradients, SparseGradients, sparse_activation, sparsified
from morphtrain.gradient.approximate import Approximate
from morphtrain.method import Closure, Method
from morphtrain.model import ResNet
from morphtrain.state import Run, derived_seed
from morphtrain.trainer import begin_epoch, build_run, checkpoint, finish_epoch, start, train_epoch
from morphtrain.trainer.checkpoint import Checkpoint

SIGMAS = 4.5  # standard errors that a mean of random numbers may be off
LAST = torch.channels_last
DENSE = [override for override in SMALL if not override.startswith("prune")]
PLAIN = (*DENSE, "tracking=none", "device=cpu")
METHODS = {
    "zero": ("gradient=approximate", "gradient.kind=zero"),
    "top1": ("gradient=approximate", "gradient.kind=top1"),
    "random": ("gradient=approximate", "gradient.kind=random"),
    "sparse": ("gradient=sparse_activation",),
}


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
    for _ in range(2):  # counted anew each time
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


def test_the_penalty_finds_gradients_to_add_to() -> None:
    """With `prune.update=subgradient` it pulls in all steps, as it does on weights that have a gradient."""
    run = run_of(*SMALL, "prune.update=subgradient", "prune.start_epoch=1", *METHODS["zero"], "gradient.share=1")
    seen = watched(run)
    train_epoch(run)
    assert all(grad.any() for step in seen[1:] for grad in step.values()), "the first one settles the strength"


def test_a_weight_that_is_computed_gets_its_part() -> None:
    torch.manual_seed(0)
    model = weight_norm(nn.Conv2d(3, 4, 3)).double()
    _, dx, exact = passed(model, draw(5, 3, 6, 6), nullcontext())
    for kind in ("zero", "top1"):
        _, dx_too, grads = passed(model, draw(5, 3, 6, 6), ApproximateGradients(kind, every=1))
        assert torch.equal(dx_too, dx)
        assert grads.keys() == exact.keys() and len(grads) == 3
        assert all(bool(grad.any()) == (kind == "top1" or "bias" in name) for name, grad in grads.items())


@pytest.mark.parametrize("order", [["zero", "sparse"], ["sparse", "zero"]], ids="-".join)
def test_both_methods_and_modes_of_ones_own_nest_in_any_order(order: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)).double()
    x, sparse = draw(4, 3, 9, 9), SparseGradients(0.9)
    contexts = {"zero": ApproximateGradients("zero"), "sparse": sparse}
    with Scaled(2.0), contexts[order[0]], contexts[order[1]], Scaled(3.0):
        y = model(x)
    torch.testing.assert_close(y, 36 * model(x))
    y.sum().backward()
    assert not model[1].weight.grad.any() and model[0].weight.grad.any()
    assert sparse.tally.entries == y.numel() + 4 * 4 * 7 * 7
    assert sparse.tally.shares()[0] > 0


def run_of(*overrides: str) -> Run:
    """A run in its first epoch."""
    run = build_run(morphtrain.compose("tracking=none", "device=cpu", *overrides))
    start(run)
    begin_epoch(run)
    return run


def trained(*overrides: str) -> Run:
    """A run after its first epoch."""
    return advanced(build_run(morphtrain.compose("tracking=none", "device=cpu", *overrides)), 1)


def watched(run: Run) -> list[dict[str, torch.Tensor]]:
    """The gradients of all steps that the optimizer takes from now on: those of kernels larger than 1."""
    seen: list[dict[str, torch.Tensor]] = []
    kernels = {name: p for name, p in run.model.named_parameters() if p.dim() == 4 and p.shape[2] > 1}

    def look(*_: Any) -> None:
        seen.append({name: p.grad.clone() for name, p in kernels.items()})

    run.optimizer.register_step_pre_hook(look)
    return seen


def test_it_is_so_in_a_share_of_the_batches_and_the_record_says_in_how_many() -> None:
    options = ("data.train_samples=1600", "batch_policy.batch_size=8", "model.blocks=1", "gradient.share=0.3")
    run = run_of(*PLAIN, *options, *METHODS["zero"])
    seen = watched(run)
    train_epoch(run)
    record = finish_epoch(run)
    left_out = [[name for name, grad in step.items() if not grad.any()] for step in seen]
    number = sum(map(bool, left_out))
    assert len(seen) == 200
    assert abs(number - 60) < SIGMAS * math.sqrt(200 * 0.3 * 0.7)
    assert record["approximated_share"] == number / 200
    kernels = list(seen[0])
    assert {tuple(names) for names in left_out} == {(), tuple(kernels[1::2])}, "of the layers in the order of calls"


class Twice(Method):
    """Computes the gradients of every step three times, as methods that take the step do."""

    def __init__(self) -> None:
        self.seen: list[set[bool]] = []

    def step(self, run: Run, closure: Closure) -> bool:
        kernels = [p for p in run.model.parameters() if p.dim() == 4 and p.shape[2] > 1]
        found = {bool(kernels[1].grad.any())}  # type: ignore[union-attr]
        for _ in range(2):
            closure()
            found.add(bool(kernels[1].grad.any()))  # type: ignore[union-attr]
        self.seen.append(found)
        run.optimizer.step()
        return True


def test_it_is_drawn_for_a_step_and_not_for_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    approximated: list[bool] = []
    original = Approximate.around_forward

    def noted(self: Approximate, run: Run) -> AbstractContextManager[Any]:
        context = original(self, run)
        approximated.append(isinstance(context, ApproximateGradients))
        return context

    monkeypatch.setattr(Approximate, "around_forward", noted)
    own = ("methods=[{_target_: test_gradient.Twice}]", "batch_policy.max_micro_batch=4")
    run = run_of(*PLAIN, *METHODS["zero"], *own)
    twice = run.methods["methods.0"]
    assert isinstance(twice, Twice)
    train_epoch(run)
    passes = 4 * 3  # in a step
    assert len(approximated) == 16 * passes
    steps = [set(approximated[first : first + passes]) for first in range(0, len(approximated), passes)]
    assert sorted(map(list, {frozenset(step) for step in steps})) == [[False], [True]]
    assert [{not each for each in step} for step in steps] == twice.seen


def test_random_numbers_are_the_methods_own() -> None:
    """What data, weights and dropout draw is as without it; each epoch has others."""
    seeds = [derived_seed(1, epoch, *stream) for epoch in (1, 2) for stream in ((), (1,))]
    assert len(set(seeds)) == 4
    sequence = np.random.SeedSequence((3, 7)).generate_state(1, np.uint64)[0]
    assert derived_seed(3, 7) == int(sequence >> 1), "the one that runs have had before"
    states = []
    for options in ((), METHODS["random"], METHODS["sparse"]):
        trained(*PLAIN, *options, "epochs=1")
        states.append(torch.random.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_none_adds_nothing_to_a_run() -> None:
    run = run_of(*PLAIN)
    assert "gradient" not in run.methods and not run.hooks("around_forward")


@pytest.mark.parametrize("method", METHODS)
def test_resumed_amid_pruning_and_growth_it_ends_in_the_same_bits(method: str, tmp_path: Path) -> None:
    """The layers that are chosen after a block was inserted or removed are those of the new order."""
    options = (*SMALL, "tracking=none", "device=cpu", "epochs=4", *METHODS[method])
    changes = ("prune.start_epoch=1", "grow=deeper", "grow.at_epochs=[2]")
    config = morphtrain.compose(*options, *changes, "precision=bf16", "memory_format=channels_last")
    whole, half = advanced(build_run(config), 4), advanced(build_run(config), 2)
    checkpoint.save(half, tmp_path, None)
    parts = advanced(Checkpoint(tmp_path / "last.pt").restore(config), 4)
    for part in ("model", "optimizer"):
        assert_same(getattr(whole, part).state_dict(), getattr(parts, part).state_dict())
    events = " ".join(change["event"] for change in whole.changes)
    assert "inserted blocks" in events and "removed" in events
    for metric in config.gradient.metrics:
        assert all(0 < record[metric] <= 1 for record in whole.history)
        assert [record[metric] for record in whole.history] == [record[metric] for record in parts.history]


def advanced(run: Run, epochs: int) -> Run:
    """A built or restored run after so many epochs."""
    start(run)
    while run.epoch < epochs:
        begin_epoch(run)
        train_epoch(run)
        finish_epoch(run)
    return run


# -- sparse activation gradients --------------------------------------------------------------------------------------


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


def test_a_run_records_zeros_and_savings_of_each_epoch() -> None:
    run = trained(*PLAIN, *METHODS["sparse"], "epochs=1")
    (record,) = run.history
    assert 0.3 < record["gradient_macs_saved"] < record["gradient_zeros"] < 0.9, "the head stays as it is"
    assert {"gradient_zeros", "gradient_macs_saved"} < set(run.config.recorded)


# -- in a config ------------------------------------------------------------------------------------------------------

SHARES = "must be above 0 and at most 1, as a share of the batches"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["gradient=approximate", "gradient.kind=top2"], "gradient.kind=top2: must be one of zero, top1, random"),
        (["gradient=approximate", "gradient.share=0"], f"gradient.share=0.0: {SHARES}"),
        (["gradient=approximate", "gradient.share=1.1"], f"gradient.share=1.1: {SHARES}"),
        (["gradient=approximate", "gradient.every=0"], "gradient.every=0: must be 1 or more; 1 is every convolution"),
        (
            ["gradient=sparse_activation", "gradient.p=1"],
            "gradient.p=1.0: must be above 0 and below 1, as a share of the gradients",
        ),
        (
            ["gradient=sparse_activation", "compile=default"],
            "gradient=sparse_activation with compile=default: it is not tested in compiled passes; compile=none works",
        ),
        (
            ["gradient=approximate", "compile=max"],
            "gradient=approximate with compile=max: it is not tested in compiled passes; compile=none works",
        ),
        (
            ["gradient=approximate", "optimizer=lars"],
            "gradient.kind=zero with optimizer=lars: its trust ratios divide by gradients; where these are zero, "
            "weights decay at the whole learning rate; gradient.kind=top1 works",
        ),
        (
            ["gradient=approximate", "prune=early", "prune.importance=taylor"],
            "gradient=approximate with prune.importance=taylor: channels are measured by gradients of weights, which "
            "are not those of the loss then; prune.importance=magnitude works",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        morphtrain.compose(*overrides)
    assert str(refused.value) == said
    works = said.rpartition("; ")[2].removesuffix(" works")
    if " with " in said:
        morphtrain.compose(*(o for o in overrides if o.split("=")[0] != works.split("=")[0]), works)


class Pointwise(nn.Module):
    """A network with one convolution, of a kernel of 1."""

    def __init__(self, num_classes: int, in_channels: int, kernel: int = 1) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(in_channels, 4, kernel), nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Linear(nn.Module):
    """A network without convolutions."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["model._target_=test_gradient.Pointwise", *METHODS["zero"]], "gradient.every=2: the network calls fewer"),
        (
            ["model._target_=test_gradient.Pointwise", "+model.kernel=3", *METHODS["top1"], "gradient.share=1"],
            "gradient.every=2: the network calls fewer",
        ),
        (["model._target_=test_gradient.Linear", *METHODS["sparse"]], "gradient=sparse_activation: the network has no"),
    ],
)
def test_a_network_without_such_layers_is_refused_in_the_first_epoch(options: list[str], said: str) -> None:
    own = [override for override in PLAIN if not override.startswith("model")]
    with pytest.raises(UserError, match=f"^{said}") as refused:
        trained(*own, "model=custom", *options)
    assert "\n" not in str(refused.value)


class Halved(Method):
    """A gradient method of one's own."""

    def after_backward(self, run: Run) -> None:
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2


def test_a_method_of_ones_own_takes_the_groups_place() -> None:
    plain = ("optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.weight_decay=0", "epochs=1")
    halved = trained(*PLAIN, *plain, "gradient=custom", "gradient._target_=test_gradient.Halved")
    slower = trained(*PLAIN, *plain, "optimizer.lr=0.05")
    torch.testing.assert_close(halved.model.state_dict(), slower.model.state_dict())


def test_both_can_be_had_in_one_run() -> None:
    listed = "methods=[{_target_: morphtrain.options.method, option: gradient/sparse_activation, p: 0.5}]"
    record = trained(*PLAIN, *METHODS["zero"], listed, "epochs=1").history[-1]
    assert record["approximated_share"] > 0 and record["gradient_zeros"] > 0.1


def test_a_checkpoint_from_before_there_was_the_group_goes_on(tmp_path: Path) -> None:
    config = morphtrain.compose(*PLAIN, "epochs=2")
    checkpoint.save(advanced(build_run(config), 1), tmp_path, None)
    stored = Checkpoint(tmp_path / "last.pt")
    del stored.facts["config"]["gradient"]
    assert stored.restore(config).epoch == 1
    own = ("gradient=custom", "gradient._target_=test_gradient.Halved")
    for options, name in ((METHODS["zero"], "approximate"), (own, "custom")):
        with pytest.raises(UserError, match=f"^gradient={name}: .* was written with gradient=none; resume"):
            stored.restore(morphtrain.compose(*PLAIN, "epochs=2", *options))


def test_a_network_learns_from_them() -> None:
    options = ("data=digits", "model.width=8", "tracking=none", "device=cpu", "epochs=3")
    for method in ("zero", "sparse"):
        run = trained_to_the_end(morphtrain.compose(*options, *METHODS[method]))
        assert run.history[-1]["val_accuracy"] > 0.8, method


def test_a_resnet_has_its_gradients_in_the_formats_of_its_weights() -> None:
    torch.manual_seed(0)
    model = ResNet(blocks=1, width=4).to(memory_format=LAST)
    x = draw(4, 3, 8, 8, dtype=torch.float32).to(memory_format=LAST)
    for context in (ApproximateGradients("top1"), ApproximateGradients("zero"), SparseGradients(0.9)):
        _, dx, grads = passed(model, x, context)
        assert dx.is_contiguous(memory_format=LAST)
        assert all(grads[name].stride() == p.stride() for name, p in model.named_parameters())
