"""One epoch of training and one of evaluation: everything a user waits for, on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from morphtrain import interrupts
from morphtrain.contracts import Batch, SelectableData
from morphtrain.errors import UserError
from morphtrain.layer_calls import seen_again
from morphtrain.morph import additions_of, exact
from morphtrain.progressive import resized
from morphtrain.state import Run, passes
from morphtrain.trainer.interruptible import Steps, interruptible
from morphtrain.trainer.tally import Tally


def train_epoch(run: Run, tick: Callable[[int], None] | None = None) -> None:
    """Train over the data once, clocked as `epoch_seconds`; sets `run.train_loss` and `run.train_accuracy`.

    `tick`, if given, is called with the number of images of every step.
    """
    with run.clock.timed("epoch_seconds"):
        for images in training_steps(run):
            if tick is not None:
                tick(images)


def training_steps(run: Run) -> Iterator[int]:
    """Train over the data once, a step whenever it is asked for the next; yields the number of images of each.

    At the end it sets `run.train_loss` and `run.train_accuracy`.
    """
    before_forward, after_step = run.hooks("before_forward"), run.hooks("after_step")
    batches, small = training_batches(run), run.small_size(run.epoch)
    tally = Tally(run.epoch_images, run.device)
    set_mode(run, training=True)
    if run.compilation is not None:
        run.compilation.begin_epoch(tally.samples // run.batch_size, run.usual_pass)
    steps = Steps(run.compilation)
    for images, labels in waited_for(batches, run):
        rows = None if run.infobatch is None else run.infobatch.rows[tally.given :][: len(labels)]
        passed = tally.give(len(labels))
        run.set_learning_rates(run.progress + passed / 2)
        if small is not None:
            images = resized(images, small)
        for hook in before_forward:
            images, labels = hook(run, (images, labels)) or (images, labels)
        _check_rows(run, rows, labels)
        with steps.next(whole=len(labels) == run.batch_size):
            loss, right = gradients(run, images, labels, rows)
            taken = take_step(run, images, labels, rows)
        if taken:
            run.progress += passed
            for hook in after_step:
                hook(run)
        run.optimizer.zero_grad()
        if hasattr(run.precision, "end_step"):
            run.precision.end_step(run.optimizer)
        tally.add(len(labels), loss, right)
        run.clock.step_done()
        yield len(labels)
    _check_given(run, tally)
    run.train_loss, run.train_accuracy = tally.means() if run.infobatch is None else run.infobatch.estimates()


def _check_given(run: Run, tally: Tally) -> None:
    """Raise a `UserError` if the data gave another number of images than it has, or methods left none of them."""
    if tally.given == tally.samples and tally.trained:
        return
    name = f"data={run.config.data.name}"
    made, has = ("train_batches_of", "rows has") if run.config.data.chooses_images else ("train_batches", "train has")
    raise UserError(
        f"{name}: {made} gave {tally.given} images, {tally.trained} of them to train on; {has} {tally.samples}"
    )


def training_batches(run: Run) -> Iterator[Batch]:
    """The batches of this epoch, of all training images or of those that InfoBatch chooses."""
    if run.infobatch is None:
        return run.all_batches()
    generator = run.generator(run.epoch)
    rows = run.infobatch.choose(run.epoch, generator, run.leaves_single)
    return cast(SelectableData, run.data).train_batches_of(rows, run.batch_size, generator)


def _check_rows(run: Run, rows: torch.Tensor | None, labels: torch.Tensor) -> None:
    """Raise a `UserError` if methods have left none of a batch's images, or other ones than those with kept scores."""
    if not len(labels):
        raise UserError("methods: before_forward leaves none of a batch's images; one or more are needed")
    if rows is not None and len(rows) != len(labels):
        raise UserError(
            f"data.infobatch={run.config.data.infobatch:g}: a method makes {len(labels)} images of the {len(rows)} of "
            "a batch, in before_forward, and no score fits; data.infobatch=0 works"
        )


def gradients(
    run: Run, images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients for a step on a batch: those of its loss, clipped, plus what methods add.

    Returns the loss, and how many images were classified correctly. `rows` are those of the images in the training set,
    whose scores InfoBatch keeps; None without it.
    """
    run.loss, right = clipped_gradients(run, images, labels, rows)
    for hook in run.hooks("after_backward"):
        hook(run)
    return run.loss, right


def clipped_gradients(
    run: Run, images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of the loss alone, clipped; see `gradients`."""
    loss, right = backward(run, images, labels, rows)
    if run.config.clip_norm is not None:
        clip_grad_norm_(run.model.parameters(), run.config.clip_norm)
    return loss, right


def backward(
    run: Run, images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of the batch's mean loss, in several passes if `run.micro_batch` says so.

    Returns the loss, and how many images were classified correctly. With `rows`, see `gradients`, the gradients are of
    the images' weighted losses, which stand for all training images: `run.step_weight` times as large on average.
    """
    parts = passes(len(labels), run.micro_batch)
    total = torch.zeros((), device=run.device)
    correct = torch.zeros((), device=run.device, dtype=torch.long)
    pieces = zip(images.tensor_split(parts), labels.tensor_split(parts), _split(rows, parts), strict=True)
    for number, (x, y, of) in enumerate(pieces, 1):
        with forward_context(run) as contexts:
            logits = run.forward(x)
            loss = _loss(run, exact(logits), y, of) * (len(y) / len(labels))
        with seen_again(*contexts):
            run.precision.backward(loss, run.optimizer, more=number < parts)
        total += loss.detach()
        correct += (logits.detach().argmax(1) == y).sum()
    return total if rows is None else total / run.step_weight, correct


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


def take_step(run: Run, images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None) -> bool:
    """The step of the first method that takes it, or else the optimizer's; False if there was none."""

    def closure(alone: bool = False) -> torch.Tensor:
        run.optimizer.zero_grad()
        return (clipped_gradients if alone else gradients)(run, images, labels, rows)[0]

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


def waited_for(batches: Iterator[Batch], run: Run) -> Iterator[Batch]:
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
    """Mean loss and accuracy (0..1) on a part of the held-out images."""
    set_mode(run, training=False)
    loss = torch.zeros((), device=run.device)
    correct = torch.zeros((), device=run.device, dtype=torch.long)
    for images, labels in getattr(run.data, f"{part}_batches")():
        interrupts.check()
        with run.precision.autocast(), interruptible():
            logits = run.model(images)
        loss += run.criterion(logits.float(), labels) * len(labels)
        correct += (logits.argmax(1) == labels).sum()
    samples = len(getattr(run.data, part))
    return loss.item() / samples, correct.item() / samples
