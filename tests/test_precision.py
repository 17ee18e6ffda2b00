"""Number formats: their ranges, what is rounded and lost in them, and the loss scale that keeps it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from number_formats import BRAIN, FORMATS, HALF, begun, config_of
from test_memory_format import stop_after
from test_resume import assert_same, contents
from test_steps import network, step_of
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from morphtrain.errors import UserError
from morphtrain.method import Closure, Method
from morphtrain.precision import autocast
from morphtrain.precision.bf16_pure import Stochastic, stochastically_rounded
from morphtrain.precision.casting import Casting
from morphtrain.state import Run
from morphtrain.trainer.build import build_run
from morphtrain.trainer.epoch import begin_epoch, finish_epoch
from morphtrain.trainer.loop import backward, train_epoch, training_steps
from morphtrain.trainer.share import Share
from morphtrain.trainer.underflow import underflow_share

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fast_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a format takes here is timed whenever one is built, which is no matter of these tests."""
    monkeypatch.setattr(autocast, "slowdown", lambda device, dtype: 1.0)


# -- the formats themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bits", "smallest", "largest", "normal"),
    [
        (HALF, torch.int16, 2.0**-24, 65504.0, 2.0**-14),  # normal from 6.10e-5
        (BRAIN, torch.int16, 2.0**-133, 255 * 2.0**120, 2.0**-126),  # to 3.39e38
        (torch.float32, torch.int32, 2.0**-149, (2**24 - 1) * 2.0**104, 2.0**-126),  # 1.1755e-38 to 3.403e38
    ],
)
def test_the_ranges_of_the_formats(
    dtype: torch.dtype, bits: torch.dtype, smallest: float, largest: float, normal: float
) -> None:
    """Read off the bits: the first number, the last one before infinity, and the first with a leading one."""
    infinity = torch.tensor(math.inf, dtype=dtype).view(bits)
    assert torch.tensor(1, dtype=bits).view(dtype).double() == smallest
    assert (infinity - 1).view(dtype).double() == largest
    first_exponent = round(normal / smallest)  # the bits of its mantissa are zero
    assert torch.tensor(first_exponent, dtype=bits).view(dtype).double() == normal
    below = torch.tensor([smallest / 2, largest * (1 + 2.0**-30)], dtype=torch.double).to(dtype)
    assert below.tolist() == [0.0, largest]
    assert torch.tensor(2 * largest, dtype=torch.double).to(dtype).isinf()


def test_stochastic_rounding_is_unbiased_and_goes_to_neighbours_only() -> None:
    torch.manual_seed(1)
    x, times = torch.randn(500) * torch.logspace(-20, 20, 500), 4000
    found = stochastically_rounded(x.expand(times, -1).contiguous())
    assert found.dtype is BRAIN
    toward = (x.view(torch.int32) & ~0xFFFF).view(torch.float32).double()  # of the two, the one nearer to zero
    away = ((x.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32).double()
    assert ((found.double() == toward) | (found.double() == away)).all()
    share = (x.double() - toward) / (away - toward)  # how often it has to go away from zero
    error = (found.double() == away).double().mean(0) - share
    expected = (share * (1 - share) / times).sqrt()
    assert abs(error.sum() / expected.square().sum().sqrt()) < 4  # standard errors, of all together
    assert (error.abs() <= 5 * expected).all()
    assert 0.8 < (error / expected).std() < 1.2


def test_stochastic_rounding_leaves_what_bfloat16_has() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-126, 255 * 2.0**120, math.inf, -math.inf])
    for _ in range(20):
        assert torch.equal(stochastically_rounded(exact).float(), exact)
    every = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert stochastically_rounded(every).isnan().all()
    last = stochastically_rounded(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


# -- loss scale -------------------------------------------------------------------------------------------------


class Looking(Method):
    """Notes the type and size of the gradients, as methods see them, and of the weights after a step."""

    def __init__(self) -> None:
        self.types: set[torch.dtype] = set()
        self.norms: list[float] = []
        self.after: set[torch.dtype] = set()

    def after_backward(self, run: Run) -> None:
        gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
        self.types |= {g.dtype for g in gradients}
        self.norms.append(torch.stack([g.float().norm() for g in gradients]).norm().item())

    def after_step(self, run: Run) -> None:
        self.after |= {p.dtype for p in run.model.parameters()}


def looked_at(*overrides: str) -> Looking:
    run = begun("methods=[{_target_: test_precision.Looking}]", *overrides)
    next(training_steps(run))
    method = run.methods["methods.0"]
    assert isinstance(method, Looking)
    return method


@pytest.mark.parametrize("name", ["o2 float16", "stochastic"])
@pytest.mark.parametrize("passes", [(), ("batch_policy.max_micro_batch=5",)], ids=["whole", "passes"])
def test_methods_see_unscaled_gradients_of_32_bits(name: str, passes: Sequence[str]) -> None:
    found, plain = looked_at(*FORMATS[name], *passes), looked_at("precision=o0", *passes)
    assert found.types == found.after == {torch.float32}
    assert found.norms == pytest.approx(plain.norms, rel=0.1)


def test_an_overflow_in_one_of_several_passes_skips_the_step() -> None:
    torch.manual_seed(0)
    model, x, y = network().float(), torch.randn(12, 2, 4, 4), torch.randint(3, (12,))
    precision = Casting(CPU, HALF, init_scale=1024.0)
    step = step_of(model, 4, precision)
    precision.prepare(model, step.optimizer)
    wanted = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    backward(step, Share(x, y, whole=12, largest=12))  # type: ignore[arg-type]
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.02, atol=0.002)
    assert precision.step(step.optimizer)
    assert precision.metrics() == {"loss_scale": 1024, "skipped_steps": 0}
    step.optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    x[0] = 1e6  # infinite in 16 bits, in the first pass of three
    backward(step, Share(x, y, whole=12, largest=12))  # type: ignore[arg-type]
    assert not precision.step(step.optimizer)
    assert_same(model.state_dict(), before)
    assert precision.metrics() == {"loss_scale": 512, "skipped_steps": 1}
    assert precision.metrics() == {"loss_scale": 512, "skipped_steps": 0}


def test_the_scale_doubles_after_2000_clean_steps_and_halves_on_overflow() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer, precision = SGD([weight], lr=0.0), Casting(CPU, HALF, init_scale=8.0)
    scales = []
    for number in range(4001):
        precision.backward(weight.sum() * (math.inf if number == 100 else 1.0), optimizer)
        assert precision.step(optimizer) == (number != 100)
        optimizer.zero_grad()
        scales.append(precision.scale)
    changes = [number for number in range(1, 4001) if scales[number] != scales[number - 1]]
    assert (changes, scales[-1]) == ([100, 2100], 8.0)


OVERFLOWING = ("precision=o2", "precision.dtype=float16", "precision.init_scale=1e8", "epochs=6")


def test_overflows_are_skipped_and_overcome_across_a_resume(tmp_path: Path) -> None:
    """The scale is halved until it fits; skipped steps leave schedule and weights as they are."""
    for name, stops in (("whole", [6]), ("parts", [2, 6])):
        (tmp_path / name).mkdir()
        for number, last in enumerate(stops):
            resume = f"resume={'auto' if number else 'never'}"
            stop_after(last, config_of(*OVERFLOWING, resume), tmp_path / name)
    whole, parts = (contents(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert_same(parts, whole)
    history = whole["facts"]["history"]
    assert history[0]["skipped_steps"] == 4  # all of the first epoch
    assert history[0]["loss_scale"] == 1e8 / 2**4
    assert history[-1]["skipped_steps"] == 0
    skipped = sum(record["skipped_steps"] for record in history)
    assert whole["facts"]["progress"] == pytest.approx(6 - skipped / 4)
    assert history[-1]["loss_scale"] == pytest.approx(1e8 / 2**skipped)
    assert history[0]["train_loss"] > history[-1]["train_loss"]


class Reads(TorchDispatchMode):
    """Counts the values that are read off the device."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "reads"), [("o1 float16", 1), ("o2 float16", 1), ("stochastic", 0)])
def test_a_step_reads_nothing_but_whether_it_overflowed(name: str, reads: int) -> None:
    run = begun(*FORMATS[name])
    steps = training_steps(run)
    next(steps)
    with Reads() as found:
        next(steps)
        next(steps)
    assert found.count == 2 * reads


class TwoSteps(Method):
    """Takes two steps on every batch, as the contract says: by the precision."""

    def __init__(self) -> None:
        self.taken: list[bool] = []

    def step(self, run: Run, closure: Closure) -> bool:
        self.taken.append(run.precision.step(run.optimizer))
        closure()
        closure()  # gradients that no step is taken with
        self.taken.append(run.precision.step(run.optimizer))
        return any(self.taken[-2:])


@pytest.mark.parametrize("name", ["o2 float16", "stochastic"])
def test_a_method_can_take_the_steps(name: str) -> None:
    run = begun(*FORMATS[name], "methods=[{_target_: test_precision.TwoSteps}]")
    before = copy.deepcopy(run.model.state_dict())
    train_epoch(run)
    assert run.methods["methods.0"].taken == [True] * 8  # type: ignore[attr-defined]
    assert run.progress == pytest.approx(1)
    assert any(not torch.equal(before[key], value) for key, value in run.model.state_dict().items())


# -- underflow --------------------------------------------------------------------------------------------------


def tiny_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A loss whose gradients are below float16's smallest number; the learning rate makes up for that."""
    return F.cross_entropy(logits, labels) * 4e-7  # 2.5e-8 for one of 16 images; half of 2^-24 is 3.0e-8


def of_tiny_loss(**keywords: Any) -> Any:
    return tiny_loss


TINY_LOSS = ("loss=custom", "loss._target_=test_precision.of_tiny_loss", "optimizer.lr=6e4", "optimizer.weight_decay=0")


@pytest.mark.parametrize("name", ["o1 float16", "o2 float16"])
def test_what_o3_loses_to_underflow_a_loss_scale_keeps(name: str) -> None:
    stalled = begun(*FORMATS["o3 float16"], *TINY_LOSS)
    before = copy.deepcopy(dict(stalled.model.named_parameters()))
    train_epoch(stalled)
    assert all(torch.equal(before[key], p) for key, p in stalled.model.named_parameters())
    assert underflow_share(stalled) == 1
    exact, kept = (begun(*TINY_LOSS, *more) for more in ((), (*FORMATS[name], "precision.init_scale=1e7")))
    losses = []
    for run in (exact, kept):
        train_epoch(run)
        first = run.train_loss
        begin_epoch(run)
        train_epoch(run)
        losses.append((first, run.train_loss))
    assert losses[1][1] < 0.9 * losses[1][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert underflow_share(kept) < 0.02


class Dropping(nn.Module):
    """A network with dropout, whose random numbers both passes have to draw alike."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(F.relu(self.norm(self.body(x))), 0.5, self.training)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("name", ["o1 float16", "o2 float16", "o3", "stochastic"])
def test_the_share_lost_is_measured_beside_the_run(name: str) -> None:
    """Nothing is left of it, dropout is the same in both, and a smaller scale loses more."""
    run = begun(*FORMATS[name], "model=custom", "model._target_=test_precision.Dropping")
    run.model.train()
    before = copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict(), torch.get_rng_state()])
    share = underflow_share(run)
    assert_same([run.model.state_dict(), run.optimizer.state_dict(), torch.get_rng_state()], before)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert share == underflow_share(run)
    assert 0 <= share < 0.3
    if "float16" in name and name != "o3 float16":
        run.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-24)  # type: ignore[attr-defined]
        assert underflow_share(run) > 0.9


@pytest.mark.parametrize("name", ["o1", "o2 float16", "o3 norms", "bf16", "stochastic"])
def test_what_is_recorded_is_what_the_schema_says(name: str) -> None:
    run = begun(*FORMATS[name])
    train_epoch(run)
    record = finish_epoch(run)
    declared = set(run.config.precision.metrics)
    everything = {"loss_scale", "skipped_steps", "underflow_share"}
    assert everything & record.keys() == declared
    assert declared == (everything if name[:2] in ("o1", "o2") else {"underflow_share"} if name[:2] == "o3" else set())
    scale = 1024 if name in ("o1 float16", "o2 float16") else 1
    assert record.get("loss_scale", scale) == scale
    assert "epoch_seconds" in record and record["train_loss"] > 0


def test_what_is_recorded_can_be_an_objective() -> None:
    assert config_of("precision=o2", "objective=[underflow_share]").objective == ["underflow_share"]
    with pytest.raises(UserError, match="objective=loss_scale: no such metric"):
        config_of("objective=[loss_scale]")


# -- stochastic rounding ----------------------------------------------------------------------------------------


def test_small_steps_are_kept_on_average() -> None:
    """Of a length that rounding to the nearest loses altogether; momentum is kept in 32 bits."""
    torch.manual_seed(0)
    layer = nn.Linear(50, 40, bias=False)
    nn.init.ones_(layer.weight)
    optimizer, precision = SGD(layer.parameters(), lr=1e-3, momentum=0.5, dampening=0.5), Stochastic(CPU)
    precision.prepare(layer, optimizer)
    assert layer.weight.dtype is BRAIN
    assert (torch.ones((), dtype=BRAIN) - 1e-3).item() == 1  # it would be lost
    for _ in range(200):
        precision.backward(layer.weight.float().sum(), optimizer)
        assert layer.weight.dtype is layer.weight.grad.dtype is torch.float32
        assert precision.step(optimizer)
        optimizer.zero_grad()
        precision.end_step(optimizer)
        assert layer.weight.dtype is BRAIN and layer.weight.grad is None
    moved = 1 - layer.weight.float()
    assert optimizer.state[layer.weight]["momentum_buffer"].dtype is torch.float32
    expected = 200 * 1e-3
    assert abs(moved.mean() - expected) < 4 * moved.std() / layer.weight.numel() ** 0.5


WRONG = {
    "precision.dtype=float8": (("precision=o2", "precision.dtype=float8"), "must be one of auto, float16, bfloat16"),
    "precision.init_scale=0.0": (("precision=o2", "precision.init_scale=0"), r"must be 1e-37 to 1e\+37: it and"),
    r"precision.init_scale=1e\+39": (("precision=o1", "precision.init_scale=1e39"), r"must be 1e-37 to 1e\+37: it and"),
    "precision.rounding=up": (("precision=bf16_pure", "precision.rounding=up"), "one of masters, stochastic"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_key_is_named(key: str) -> None:
    options, wanted = WRONG[key]
    with pytest.raises(UserError, match=f"^{key}: .*{wanted}"):
        config_of(*options)


@pytest.mark.parametrize("fused", ["true", "false"])
def test_an_eps_that_is_zero_in_the_format_is_refused(fused: str) -> None:
    """What AdamW divides by would be zero wherever the square of a gradient is."""
    adamw = ("optimizer=adamw", f"optimizer.fused={fused}")
    wanted = r"^optimizer.eps=1e-08: is zero in float16, in which precision=o3 divides by it; optimizer.eps=1e-5, or "
    for name in ("o3 float16", "o3 norms"):
        with pytest.raises(UserError, match=wanted):
            build_run(config_of(*FORMATS[name], *adamw))
        own = ("optimizer=custom", "optimizer._target_=torch.optim.RMSprop", "+optimizer.lr=0.01")
        with pytest.raises(UserError, match=wanted):
            build_run(config_of(*FORMATS[name], *own))
        build_run(config_of(*FORMATS[name], *adamw, "optimizer.eps=1e-5"))
    build_run(config_of(*FORMATS["o3"], *adamw))
    build_run(config_of(*FORMATS["o2 float16"], *adamw))


class Broken(nn.Module):
    """A network whose loss is finite, and whose gradients are not."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(x.mean((2, 3)))
        return x + (0 * x).abs().sqrt()


def test_gradients_that_no_scale_makes_finite_end_the_run() -> None:
    """It would go on to its end, and skip every step."""
    run = begun(
        *FORMATS["o1 float16"], "model=custom", "model._target_=test_precision.Broken", "batch_policy.batch_size=1"
    )
    with pytest.raises(UserError, match=r"^precision: gradients are infinite or not a number whatever"):
        for _ in range(4):
            train_epoch(run)
            finish_epoch(run)
            begin_epoch(run)
