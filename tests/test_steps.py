"""What a training step can do beyond the plain one: batches in several passes, clipped gradients."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import morphtrain
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.precision import Precision
from morphtrain.state import Run, passes
from morphtrain.trainer.build import build_run
from morphtrain.trainer.epoch import start
from morphtrain.trainer.loop import backward, train_epoch
from morphtrain.trainer.share import Share

CPU = torch.device("cpu")
SMALL = (
    "data=synthetic",
    "data.train_samples=50",
    "data.val_samples=8",
    "data.image_size=8",
    "batch_policy.batch_size=16",
    "schedule.warmup_epochs=0",
    "device=cpu",
)
PLAIN_STEPS = ("optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.weight_decay=0")
HALF = ("precision.dtype=float16",)
NO_NORM = ("model=alexnet", "model.dropout=null", "model.batch_norm=false")


def started(*overrides: str) -> Run:
    run = build_run(morphtrain.compose(*SMALL, *overrides))
    run.epoch = 1
    start(run)
    return run


def step_of(model: nn.Module, micro_batch: int | None, precision: Precision) -> SimpleNamespace:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = {
        "hooks": lambda name: [],
        "forward": model,
        "model": model,
        "optimizer": optimizer,
        "criterion": F.cross_entropy,
        "precision": precision,
        "own_numbers": nullcontext,
    }
    return SimpleNamespace(**parts, micro_batch=micro_batch, device=CPU)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(images=st.integers(1, 30), micro_batch=st.integers(1, 40))
def test_in_passes_the_gradient_is_that_of_the_whole_batch(images: int, micro_batch: int) -> None:
    model = network()
    x, y = torch.randn(images, 2, 4, 4, dtype=torch.double), torch.randint(3, (images,))
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    seen: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    found, correct = backward(step_of(model, micro_batch, Precision(CPU)), Share(x, y, images, images))  # type: ignore[arg-type]
    assert correct == (logits.argmax(1) == y).sum()
    torch.testing.assert_close(found, loss.detach(), check_dtype=False)
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert sum(seen) == images
    assert max(seen) <= micro_batch
    assert max(seen) - min(seen) <= 1
    assert len(seen) == math.ceil(images / micro_batch) == passes(images, micro_batch)


def test_scaled_losses_are_unscaled_once() -> None:
    model = network().float()
    x, y = torch.randn(10, 2, 4, 4), torch.randint(3, (10,))
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    precision = Precision(CPU, torch.float16, init_scale=1024.0)
    step = step_of(model, 4, precision)
    backward(step, Share(x, y, whole=10, largest=10))  # type: ignore[arg-type]
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0.02, atol=0.002)
    assert precision.step(step.optimizer)


def test_an_epoch_in_passes_ends_with_the_same_weights() -> None:
    whole, parts = started(*NO_NORM), started(*NO_NORM, "batch_policy.max_micro_batch=5")
    before = copy.deepcopy(whole.model.state_dict())
    for run in (whole, parts):
        train_epoch(run)
    assert parts.progress == pytest.approx(1)
    assert parts.train_loss == pytest.approx(whole.train_loss, rel=1e-5)
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[key], value, rtol=1e-3, atol=1e-5)
    moved = sum((whole.model.state_dict()[key] - value).abs().sum().item() for key, value in before.items())
    assert moved > 1


def test_batch_norm_sees_the_passes() -> None:
    run = started("batch_policy.max_micro_batch=6")
    train_epoch(run)
    norm = next(m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.num_batches_tracked == 3 * 3 + 1  # 16 = 6 + 5 + 5, three times; then the last two images


def test_single_images_are_refused_where_the_network_cannot_train_on_them() -> None:
    at_one_pixel = ("model.stages=4", "model.width=4")
    started(*at_one_pixel)
    for overrides, message in (
        (["batch_policy.batch_size=1"], "batch_policy.batch_size=1: "),
        (["batch_policy.batch_size=49"], "batch_policy.batch_size=49: of 50 images"),
        (["batch_policy.max_micro_batch=1"], "in passes of at most 1, a single one is left"),
        (["batch_policy.batch_size=1", "norm=ghost"], "more than 1 value per channel"),
    ):
        with pytest.raises(UserError, match=message):
            started(*at_one_pixel, *overrides)
    started("batch_policy.batch_size=1")  # batch norm over more pixels can


@pytest.mark.parametrize("batch", [[], ["precision=o1", *HALF], ["precision=o2", *HALF]], ids=["o0", "o1", "o2"])
def test_gradients_are_clipped(batch: list[str]) -> None:
    one_step = ("batch_policy.batch_size=50", *PLAIN_STEPS, *batch)
    free, clipped, loose = (started(*one_step, *more) for more in ([], ["clip_norm=0.01"], ["clip_norm=1e9"]))
    moves = []
    for run in (free, clipped, loose):
        before = [p.detach().clone() for p in run.model.parameters()]
        train_epoch(run)
        lr = run.optimizer.param_groups[0]["lr"]
        moves.append(torch.cat([((b - p) / lr).flatten() for b, p in zip(before, run.model.parameters(), strict=True)]))
    gradient, short, same = (move.detach() for move in moves)
    assert gradient.norm() > 0.1
    assert torch.equal(same, gradient)
    torch.testing.assert_close(short, gradient * 0.01 / gradient.norm(), rtol=1e-3, atol=1e-5)


def test_clipping_leaves_overflows_to_the_loss_scale() -> None:
    run = started("precision=o1", "precision.dtype=float16", "precision.init_scale=1e30", "clip_norm=1.0", *PLAIN_STEPS)
    before = [p.detach().clone() for p in run.model.parameters()]
    train_epoch(run)
    assert all(torch.equal(b, p) for b, p in zip(before, run.model.parameters(), strict=True))
    assert run.progress == 0


class Adding(Method):
    def after_backward(self, run: Run) -> None:
        for p in run.model.parameters():
            assert p.grad is not None
            p.grad.add_(1.0)


def test_what_a_method_adds_is_not_clipped() -> None:
    """The lasso's share of the loss is set by its ratio, whichever of its two updates takes it."""
    run = started("batch_policy.batch_size=50", "clip_norm=1e-9", *PLAIN_STEPS)
    run.methods["prune"] = Adding()
    before = [p.detach().clone() for p in run.model.parameters()]
    train_epoch(run)
    lr = run.optimizer.param_groups[0]["lr"]
    for old, new in zip(before, run.model.parameters(), strict=True):
        torch.testing.assert_close(old - new, torch.full_like(old, lr), rtol=1e-3, atol=1e-6)
