"""The interfaces of a run's parts, MorphTrain's own and the user's (`_target_`).

An option is built from its config and from the keywords that its group is given:

    group          is given                    builds
    model          num_classes, in_channels    an nn.Module: images (B, C, H, W) -> logits (B, num_classes)
    data                                       Data
    norm           model                       nothing: it changes the model's norms in place
    precision      device                      Precision
    optimizer      model                       a torch.optim.Optimizer; with `build_method` also a Method
    loss           num_classes                 Loss
    schedule       epochs                      Schedule
    prune, grow, gradient,                     a Method (`morphtrain.method`); `none` builds None
      batch_policy
    tracking       run_id                      a Tracker (`morphtrain.tracker`)

A user's own optimizer is also given `params`, the trainable parameters. A part with `state_dict` and `load_state_dict`
is saved in the checkpoints and restored from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

Batch = tuple[torch.Tensor, torch.Tensor]  # (B, C, H, W), float and normalised; (B,), int64

# Logits (B, classes) and labels (B,) -> the mean loss of the batch, a scalar. One that has torch's `reduction`, as an
# attribute or a keyword, can also say the loss of each image, which `data.infobatch` needs. With `data.mixup` or
# `data.cutmix`, labels are the shares of the classes (B, classes) in training, and (B,) in evaluation.
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Epochs done so far, fractions included -> factor on the optimizer's learning rates. It has no state: a resumed run
# simply calls it again, and a changed batch size does not stretch it.
Schedule = Callable[[float], float]

# What a norm of ours that starts from data does before the first step of a run: with the model, and a pass of training
# images (B, C, H, W). It is the function `start` of the option's module. Beside a norm of your own, a method can do so.
NormStart = Callable[[nn.Module, torch.Tensor], None]


@runtime_checkable
class Data(Protocol):
    """A training and a held-out set of labelled images; labels are 0 .. num_classes - 1.

    The held-out set is what decisions are based on: when to grow, which trial is best. A data set may also have `test`
    and `test_batches`, of the same kinds: images that no decision sees, evaluated once at the end of a run.

    One that also has `preprocessing`, a `morphtrain.preprocessing.Preprocessing`, lets checkpoints and exports say how
    its images were normalised and what its classes are called.
    """

    num_classes: int

    @property
    def train(self) -> Sized:
        """The training set; its length is the number of images in an epoch."""

    @property
    def val(self) -> Sized:
        """The held-out set."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""

    @property
    def advice(self) -> str:
        """What to change when a run waits too long for this data."""

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Data:
        """The same data, with batches on `device` and images in `memory_format`."""

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch in random order, augmented; the last batch may be smaller.

        Order and augmentation depend on `generator` (a CPU generator) alone, not on `batch_size`.
        """

    def val_batches(self) -> Iterator[Batch]:
        """The held-out set once, in order."""


@runtime_checkable
class SelectableData(Data, Protocol):
    """Data that gives training images one asks for: not all of them (`data.infobatch`), or as before (`data.order`)."""

    def train_batches_of(self, rows: torch.Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Training images `rows`, each 0 .. len(train) - 1 (an int64 tensor on the CPU), in this order, augmented.

        Batches are as those of `train_batches`; the augmentation depends on `rows` and `generator` alone.
        """


@runtime_checkable
class DividedData(SelectableData, Protocol):
    """Data of which each of several processes makes only its own images of every batch.

    It need not be: of other data, every process makes whole batches, and trains on its own images of them. Data may
    also have `own_batches(part)`, which gives this process's images of the batches of `val_batches` (part "val") or
    `test_batches` ("test"), where it has any; otherwise each process makes all of those, too.
    """

    def train_slices_of(
        self, rows: torch.Tensor, parts: Sequence[slice], generator: torch.Generator
    ) -> Iterator[Batch]:
        """Of the images that `train_batches_of` gives for `rows`, those of each of these parts, as a batch each.

        They are in the same order and augmented in the same way, whatever the other parts are: draw for all of `rows`.
        A part may be empty, and has a batch without images then. `train_batches` has to give what this does for the
        rows `torch.randperm(len(train), generator=generator)`.
        """


@runtime_checkable
class Precision(Protocol):
    """How a training step computes: the type that operations are cast to, and the loss scale that goes with it.

    One may also have

        prepare(model, optimizer)   called once they are made, before a checkpoint's values are loaded
        end_step(optimizer)         called after each step, when methods have seen the weights after it
        metrics()                   what to record of the epoch that has just ended; called once
        unscale(optimizer)          what `backward` does for the last loss of a step after it has added the gradients.
                                    Several processes need it: they sum the gradients of all their losses first, which
                                    they add with `more`
        context(device_type), update(optimizer)
                                    what copies of the network do whose steps are timed, or whose memory is estimated
                                    (`morphtrain.cost.step.Format`); without both, they cast to `dtype` and step plainly
    """

    dtype: torch.dtype | None  # what `autocast` casts to; None for the parameters' own type

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""

    def backward(self, loss: torch.Tensor, optimizer: Optimizer, more: bool = False) -> None:
        """Add the gradients of `loss`; unscale them unless `more` losses of the same step follow."""

    def step(self, optimizer: Optimizer) -> bool:
        """Take the optimizer's step; False if it was skipped."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
