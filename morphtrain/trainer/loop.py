"""One epoch of training and one of evaluation: everything a user waits for, on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from morphtrain import interrupts, slices, world
from morphtrain.contracts import Batch
from morphtrain.errors import UserError
from morphtrain.layer_calls import seen_again
from morphtrain.morph import additions_of, exact
from morphtrain.progressive import resized
from morphtrain.settling import synchronises
from morphtrain.state import MIXED, Run, derived_seed, passes
from morphtrain.trainer.interruptible import Steps, interruptible
from morphtrain.trainer.share import Share, training_shares
from morphtrain.trainer.sums import sum_gradients
from morphtrain.trainer.tally import Tally

T = TypeVar("T")


def train_epoch(
    run: Run,
    tick: Callable[[int], None] | None = None,
    steps: Callable[[Run], Iterator[int]] | None = None,
) -> None:
    """Train over the data once, clocked as `epoch_seconds`; sets `run.train_loss` and `run.train_accuracy`.

    Args:
        tick: called with the number of images of every step.
        steps: takes them, and looks at them meanwhile; by default `training_steps`.
    """
    with run.clock.timed("epoch_seconds"):
        for images in (steps or training_steps)(run):
            if tick is not None:
                tick(images)
    keep_means(run)


def keep_means(run: Run) -> None:
    """Set `run.train_loss` and `run.train_accuracy` after the last step of an epoch."""
    assert run.epoch_means is not None
    run.train_loss, run.train_accuracy = run.epoch_means()  # waits for the device: whether to, is for the clock to say


def training_steps(run: Run) -> Iterator[int]:
    """Train over the data once, a step whenever it is asked for the next; yields the number of images of each.

    Every process trains on its share of each batch. Counts, losses, gradients, and so all that follows from them, are
    those of whole batches. At the end it sets `run.epoch_means`.
    """
    after_step, shares = run.hooks("after_step"), training_shares(run)
    tally = Tally(run.epoch_images, run.device)
    set_mode(run, training=True)
    if run.compilation is not None:
        run.compilation.begin_epoch(tally.samples // run.batch_size, run.usual_pass)
    steps = Steps(run.compilation)
    for given in waited_for(shares, run):
        passed = tally.give(given.whole)
        run.set_learning_rates(run.progress + passed / 2)
        share = mixed(run, prepared(run, given), tally.given)
        with steps.next(whole=share.whole == run.batch_size):
            loss, right = gradients(run, share)
            taken = take_step(run, share)
        if taken:
            run.progress += passed
            for hook in after_step:
                hook(run)
        run.optimizer.zero_grad()
        if hasattr(run.precision, "end_step"):
            run.precision.end_step(run.optimizer)
        if taken:
            run.update_averages(passed)
        tally.add(share.whole, loss, right)
        run.clock.step_done()
        yield share.whole
    _check_given(run, tally)
    if run.infobatch is not None:
        run.infobatch.exchange()
    run.epoch_means = tally.means if run.infobatch is None else run.infobatch.estimates


def _check_given(run: Run, tally: Tally) -> None:
    """Raise a `UserError` if the data gave another number of images than it has, or methods left none of them."""
    if tally.given == tally.samples and tally.trained:
        return
    name = f"data={run.config.data.name}"
    made, has = ("train_batches_of", "rows has") if run.config.data.chooses_images else ("train_batches", "train has")
    raise UserError(
        f"{name}: {made} gave {tally.given} images, {tally.trained} of them to train on; {has} {tally.samples}"
    )


def prepared(run: Run, share: Share) -> Share:
    """The share as it goes through the network: resized in the first epochs, and as the methods have made it.

    They may have changed the number of its images, and with it that of the whole batch.
    """
    images, labels = share.images, share.labels
    hooks, small = run.hooks("before_forward"), run.small_size(run.epoch)
    if small is not None:
        images = resized(images, small)
    with run.own_numbers():
        for hook in hooks:
            images, labels = hook(run, (images, labels)) or (images, labels)
    if not hooks:
        return replace(share, images=images)
    counts = world.gathered(len(labels))
    if not sum(counts):
        raise UserError("methods: before_forward leaves none of a batch's images; one or more are needed")
    _check_rows(run, share, labels)
    return Share(images, labels, sum(counts), max(counts), share.rows)


def _check_rows(run: Run, share: Share, labels: torch.Tensor) -> None:
    """Raise a `UserError` if a method has changed the number of images whose scores are kept."""
    rows = share.rows
    if rows is not None and len(rows) != len(labels):
        raise UserError(
            f"data.infobatch={run.config.data.infobatch:g}: a method makes {len(labels)} images of the {len(rows)} of "
            "a batch, in before_forward, and no score fits; data.infobatch=0 works"
        )


def mixed(run: Run, share: Share, given: int) -> Share:
    """The share with its images mixed, as `data.mixup` and `data.cutmix` say; its labels are shares of classes then.

    `given` is how many images the epoch has given so far: no other batch is mixed by the same random numbers.
    """
    if run.mixing is None:
        return share
    changed = run.hooks("before_forward")
    counts = world.gathered(len(share.labels)) if changed else slices.sizes(share.whole)
    seed = derived_seed(run.config.seed, run.epoch, MIXED, given)
    images, labels = run.mixing(share.images, share.labels, counts, seed)
    return replace(share, images=images, labels=labels)


def gradients(run: Run, share: Share) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients for a step on a batch: those of its loss, clipped, plus what methods add.

    Returns the batch's loss, and how many of its images were classified correctly.
    """
    run.loss, right = clipped_gradients(run, share)
    for hook in run.hooks("after_backward"):
        hook(run)
    return run.loss, right


def clipped_gradients(run: Run, share: Share) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of the loss alone, clipped; see `gradients`."""
    loss, right = backward(run, share)
    if run.config.clip_norm is not None:
        clip_grad_norm_(run.model.parameters(), run.config.clip_norm)
    return loss, right


def backward(run: Run, share: Share) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of a batch's mean loss, in several passes if `run.micro_batch` says so.

    Every process computes those of its share, in as many passes as any of them needs. Returns the loss, and how many
    images were classified correctly. With rows, the gradients are of the images' weighted losses, which stand for all
    training images: `run.step_weight` times as large on average.
    """
    several = world.size() > 1
    images, labels = share.images, share.labels
    parts = passes(share.largest, run.micro_batch)
    total = torch.zeros((), device=run.device)
    correct = torch.zeros((), device=run.device, dtype=torch.long)
    pieces = zip(images.tensor_split(parts), labels.tensor_split(parts), _split(share.rows, parts), strict=True)
    with run.own_numbers():
        for number, (x, y, rows) in enumerate(pieces, 1):
            loss, right, contexts = _pass(run, x, y, rows)
            loss = loss * (len(y) / share.whole)
            with seen_again(*contexts):
                run.precision.backward(loss, run.optimizer, more=several or number < parts)
            total = total + loss.detach()
            correct += right
    if several:
        total, correct = sum_gradients(run.model, run.optimizer, total, correct)
        assert hasattr(run.precision, "unscale"), "checked when the run was built"
        run.precision.unscale(run.optimizer)
    return total if share.rows is None else total / run.step_weight, correct


def _pass(
    run: Run, images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | int, Sequence[AbstractContextManager[Any]]]:
    """The mean loss of images that go through the network at once, how many were classified right, and the contexts.

    A process without images, which it may be in batches of few, has a loss of zero. They go through the network only if
    others wait for it there.
    """
    if not len(labels) and not synchronises(run.model):
        return torch.zeros((), device=run.device, requires_grad=True), 0, ()
    with forward_context(run) as contexts:
        logits = run.forward(images)
        loss = _loss(run, exact(logits), labels, rows) if len(labels) else exact(logits).sum()
    return loss, _right(logits, labels), contexts


def _right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many images are classified correctly; a mixed one (B, classes) as the class that it has most of."""
    classes = labels.argmax(1) if labels.dim() > 1 else labels
    return (logits.detach().argmax(1) == classes).sum()


@contextmanager
def forward_context(run: Run) -> Iterator[list[AbstractContextManager[Any]]]:
    """What methods and the precision put around a forward pass of a training step; the precision's is the inner one."""
    contexts = [*(hook(run) for hook in run.hooks("around_forward")), run.precision.autocast()]
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield contexts


def _loss(run: Run, logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The mean loss of the images of a pass; with their rows, weighted by InfoBatch."""
    if rows is None:
        return run.criterion(logits, labels)
    assert run.infobatch is not None
    return run.infobatch.loss(logits, labels, rows)


def _split(rows: torch.Tensor | None, parts: int) -> Sequence[torch.Tensor | None]:
    return [None] * parts if rows is None else rows.tensor_split(parts)


def take_step(run: Run, share: Share) -> bool:
    """The step of the first method that takes it, or else the optimizer's; False if there was none."""

    def closure(alone: bool = False) -> torch.Tensor:
        run.optimizer.zero_grad()
        return (clipped_gradients if alone else gradients)(run, share)[0]

    with additions_of(run.optimizer).paced():
        for hook in run.hooks("step"):
            taken: bool | None = hook(run, closure)
            if taken is not None:
                return taken
        taken = run.precision.step(run.optimizer)
    if taken is None:
        name = run.config.precision.name
        raise UserError(f"precision={name}: its step returns nothing; True if a step was taken, else False, is needed")
    return taken


def waited_for(batches: Iterator[T], run: Run) -> Iterator[T]:
    """The same batches; the time spent waiting for them becomes `data_seconds`, a part of `epoch_seconds`.

    On an asynchronous device this is the host's time only: the device may still be busy meanwhile.
    """
    waited = 0.0
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - start
        if batch is None:
            break
        yield batch
    run.clock.seconds["data_seconds"] = waited


def set_mode(run: Run, training: bool) -> None:
    """Put the model, and a loss that is a module, into training or evaluation mode."""
    run.model.train(training)
    if isinstance(run.criterion, nn.Module):
        run.criterion.train(training)


@torch.no_grad()
def evaluate(run: Run, part: Literal["val", "test"] = "val") -> tuple[float, float]:
    """Mean loss and accuracy (0..1) on a part of the held-out images, of which each process takes its share."""
    set_mode(run, training=False)
    loss = torch.zeros((), device=run.device)
    correct = torch.zeros((), device=run.device, dtype=torch.long)
    for images, labels in _held_out(run, part):
        interrupts.check()
        with run.precision.autocast(), interruptible():
            logits = run.model(images)
        loss += run.criterion(logits.float(), labels) * len(labels)
        correct += (logits.argmax(1) == labels).sum()
    world.sum_([loss, correct])
    samples = len(getattr(run.data, part))
    return loss.item() / samples, correct.item() / samples


def _held_out(run: Run, part: Literal["val", "test"]) -> Iterator[Batch]:
    """This process's images of the batches of a part of the held-out images, where it has any."""
    if world.size() > 1 and hasattr(run.data, "own_batches"):
        yield from run.data.own_batches(part)
        return
    for images, labels in getattr(run.data, f"{part}_batches")():
        own = slices.own(slice(0, len(labels)))
        if own.start < own.stop:
            yield images[own], labels[own]
