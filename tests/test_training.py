"""Schedules, precision, optimizer groups, clock: the parts of the loop, each against an independent account."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from networks import LABELS
from torch import nn
from torch.nn import functional as F

from morphtrain import schema
from morphtrain.model import ResNet
from morphtrain.optimizer import adamw, sgd
from morphtrain.precision import bf16, o0, o1
from morphtrain.schedule import cosine, linear, milestones
from morphtrain.state import Run, derived_seed
from morphtrain.timing.clock import Clock
from morphtrain.trainer.loop import train_epoch
from morphtrain.trainer.tally import Tally

CPU = torch.device("cpu")


def test_cosine_agrees_with_torchs() -> None:
    factor = cosine.build(schema.schedule.Schedule("cosine", 0), epochs=10)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for epoch in range(11):
        assert factor(epoch) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_linear_ends_at_zero_and_milestones_fall() -> None:
    line = linear.build(schema.schedule.Schedule("linear", 0), epochs=8)
    assert [line(e) for e in (0, 2, 8, 9)] == [1, 0.75, 0, 0]
    steps = milestones.build(schema.schedule.Milestones("milestones", 0, [0.5, 0.75], 0.1), epochs=100)
    assert [steps(e) for e in (0, 49.99, 50, 75)] == pytest.approx([1, 1, 0.1, 0.01])


def test_warmup_rises_linearly_to_the_schedule() -> None:
    plain = cosine.build(schema.schedule.Schedule("cosine", 0), epochs=10)
    warm = cosine.build(schema.schedule.Schedule("cosine", 4), epochs=10)
    assert warm(0) == 0
    assert warm(1) == pytest.approx(plain(1) / 4)
    assert [warm(e) for e in (4, 7)] == [plain(e) for e in (4, 7)]


@pytest.mark.parametrize("build", [sgd.build, adamw.build])
def test_norms_and_biases_do_not_decay(build) -> None:
    config = (
        schema.optimizer.SGD("sgd", 0.1, 0.9, True, 0.3, False)
        if build is sgd.build
        else schema.optimizer.AdamW("adamw", 0.1, [0.9, 0.99], 1e-8, 0.3, False)
    )
    model = ResNet(blocks=1)
    decaying, plain = build(config, model).param_groups
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.3, 0)
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert {id(p) for p in decaying["params"]} == {id(w) for w in weights}
    assert len(decaying["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_precision_types() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    for precision, expected in (
        (o0.build(schema.precision.Precision("o0"), CPU), torch.float32),
        (bf16.build(schema.precision.Precision("bf16"), CPU), torch.bfloat16),
        (o1.build(schema.precision.Mixed("o1", "auto", 2.0**16), CPU), torch.bfloat16),
        (o1.build(schema.precision.Mixed("o1", "float16", 2.0**16), CPU), torch.float16),
    ):
        with precision.autocast():
            assert layer(x).dtype is expected
        assert precision.scaler.is_enabled() == (expected is torch.float16)


def test_loss_scaling_unscales_before_the_hooks_and_skips_overflows() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 4)
    F.cross_entropy(model(x), LABELS).backward()
    expected = model.weight.grad.clone()
    optimizer.zero_grad()
    precision = o1.build(schema.precision.Mixed("o1", "float16", 1024.0), CPU)
    precision.backward(F.cross_entropy(model(x), LABELS), optimizer)
    torch.testing.assert_close(model.weight.grad, expected)
    assert precision.step(optimizer)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full_like(model.weight, math.inf)
    precision.scaler._per_optimizer_states.clear()
    precision.backward(model(x).sum() * math.inf, optimizer)
    assert not precision.step(optimizer)
    assert torch.equal(model.weight.detach(), before)
    assert precision.state_dict()["scale"] == 512


@pytest.mark.parametrize("sync", ["edges", "each", "none"])
def test_the_clock_charges_what_was_waited_for(sync: str) -> None:
    clock = Clock(CPU, sync)
    with clock.timed("nap"):
        time.sleep(0.05)
        clock.step_done()
    assert 0.05 <= clock.seconds["nap"] < 0.5


def test_the_loss_is_read_when_the_clock_has_stopped(
    small_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading waits for the device: with timing.sync=none it would be the clock that waits."""
    run, stopped, means = small_run("tracking=none", "device=cpu"), [], Tally.means

    def read(tally: Tally) -> tuple[float, float]:
        stopped.append("epoch_seconds" in run.clock.seconds)
        return means(tally)

    monkeypatch.setattr(Tally, "means", read)
    train_epoch(run)
    assert stopped == [True]
    assert 0 < run.train_loss < 10


@pytest.mark.gpu
@pytest.mark.parametrize(("sync", "waits"), [("edges", True), ("none", False)])
def test_the_clock_waits_for_the_device(sync: str, waits: bool) -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    clock = Clock(device, "edges")
    for _ in range(2):  # the first time warms up
        with clock.timed("work"):
            for _ in range(20):
                x @ x
    honest = clock.seconds["work"]
    clock = Clock(device, sync)
    clock.wait()
    with clock.timed("work"):
        for _ in range(20):
            x @ x
    assert (clock.seconds["work"] > 0.5 * honest) == waits


def test_epochs_and_seeds_have_unrelated_randomness() -> None:
    seeds = {derived_seed(seed, epoch) for seed in range(20) for epoch in range(200)}
    assert len(seeds) == 20 * 200
