"""InfoBatch (Qin et al. 2024, arXiv 2303.04947): epochs that leave out some of what is learnt already.

An image's score is its loss when it was last trained on. Of the images below the mean score, an epoch leaves a random
share out, and multiplies the losses of the others of them by what makes up for that. So the sum of an epoch's gradients
is, in expectation, that over all images (section 3.3), in fewer steps. The first epoch has no scores and leaves nothing
out; nor do the last ones, whose images all count the same.

Where the paper draws each image by itself, here their number is fixed, as in its authors' code: of 101 images at a
share of a half, 50 are kept, which count 101/50 each. So the weights of an epoch sum up to the number of all images.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from morphtrain import world
from morphtrain.contracts import Data, Loss
from morphtrain.errors import UserError, said
from morphtrain.part_checks import check_selectable
from morphtrain.schema.data import Curriculum

TRIED = 4  # images that a loss is tried on


class InfoBatch:
    """The scores of all training images, and what follows from them for the present epoch.

    Args:
        samples: how many training images there are, N.
        losses: logits (B, classes) and labels (B,) to the loss of each image (B,).
        drop: the share that is left out of the images below the mean score, 0 to 1.
        last_epoch: the last that leaves any out.
        device: the run's.

    Attributes:
        rows: (K,), the training images of this epoch, in its order.
        weights: (N,), what each of them counts; K of them sum up to N.
    """

    def __init__(self, samples: int, losses: Loss, drop: float, last_epoch: int, device: torch.device) -> None:
        self.losses, self.drop, self.last_epoch = losses, drop, last_epoch
        self.scores = torch.full((samples,), math.inf, device=device)  # not known; none is below a mean
        self.right = torch.zeros(samples, dtype=torch.bool, device=device)
        self.weights = torch.ones(samples, device=device)
        self._trained: list[torch.Tensor] = []  # rows of the images that this process has trained on in this epoch
        self.take_all()

    def take_all(self) -> None:
        """Take all images, which count alike, until an epoch chooses; so does a run that has just been resumed."""
        self.weights.fill_(1.0)
        self.rows = torch.arange(len(self.scores), device=self.scores.device)

    def choose(self, epoch: int, generator: torch.Generator, leaves_single: Callable[[int], bool]) -> torch.Tensor:
        """Choose the images of an epoch; returns `rows`, in random order, on the CPU.

        Args:
            leaves_single: whether an epoch of so many images would end in a pass with a single one, which batch norm
                cannot train on; one more image is kept then, unless an epoch of all has such a pass, too.
        """
        order = torch.randperm(len(self.scores), generator=generator)
        self.weights.fill_(1.0)
        self._trained = []
        if epoch <= self.last_epoch:
            order = order[self._kept(generator, leaves_single)[order]]
        self.rows = order.to(self.scores.device)
        return order

    def _kept(self, generator: torch.Generator, leaves_single: Callable[[int], bool]) -> torch.Tensor:
        """Which images this epoch keeps, (N,), bool; sets `weights`."""
        known = self.scores[self.scores.isfinite()]
        low = (self.scores < known.mean()).nonzero().flatten().cpu()
        samples, number = len(self.scores), min(len(low), max(1, round((1 - self.drop) * len(low))))
        if not leaves_single(samples):
            while leaves_single(samples - len(low) + number):  # in the end it is `samples`
                number += 1
        drawn = low[torch.randperm(len(low), generator=generator)]
        kept = torch.ones(samples, dtype=torch.bool)
        kept[drawn[number:]] = False
        if number:
            self.weights[drawn[:number].to(self.weights.device)] = len(low) / number
        return kept

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The mean of the weighted losses of images `rows` (B,), a scalar; their losses become their scores."""
        losses = self.losses(logits, labels)
        self._trained.append(rows)
        self.scores[rows] = losses.detach().to(self.scores.dtype)
        self.right[rows] = logits.detach().argmax(1) == labels
        return (losses * self.weights[rows]).mean()

    def exchange(self) -> None:
        """Give every process the scores of all images of this epoch: each has those that it has trained on."""
        if world.size() == 1:
            return
        known = torch.stack([self.scores, self.right.to(self.scores.dtype)])  # (2, N)
        found = torch.zeros_like(known)
        for rows in self._trained:
            found[:, rows] = known[:, rows]
        world.sum_([found])
        self.scores[self.rows], self.right[self.rows] = found[0, self.rows], found[1, self.rows] > 0

    def estimates(self) -> tuple[float, float]:
        """Loss and accuracy (0..1) in this epoch's forward passes, as unbiased estimates of those over all images."""
        weights, scores, right = (x[self.rows].cpu().double() for x in (self.weights, self.scores, self.right))
        count = weights.sum()  # the number of all images, apart from rounding
        return (weights * scores).sum().item() / count.item(), (weights * right).sum().item() / count.item()

    def state_dict(self) -> dict[str, Any]:
        """The scores: all that an epoch needs of those before it."""
        return {"scores": self.scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; raises a ValueError for scores of another training set."""
        scores: torch.Tensor = state["scores"]
        if scores.shape != self.scores.shape:
            raise ValueError(f"scores of {len(scores)} images; the training set has {len(self.scores)}")
        self.scores.copy_(scores)


def unreduced(loss: Loss) -> Loss | None:
    """The loss of each image, (B,), instead of their mean; None if `loss` cannot say it.

    It can if it has torch's `reduction`: an attribute, as `torch.nn.CrossEntropyLoss` has, or a keyword, as
    `cross_entropy` has.
    """
    if isinstance(getattr(loss, "reduction", None), str):
        return _Unreduced(loss)
    call = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        takes = "reduction" in inspect.signature(call).parameters
    except (TypeError, ValueError):  # compiled code may have no signature
        return None
    reducing: Any = loss  # by a keyword that is no part of the contract
    return functools.partial(reducing, reduction="none") if takes else None


class _Unreduced:
    """A loss with an attribute `reduction`, which is "none" during each call; state and mode stay those of the loss."""

    def __init__(self, loss: Any) -> None:
        self.of = loss

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        before, self.of.reduction = self.of.reduction, "none"
        try:
            losses: torch.Tensor = self.of(logits, labels)
        finally:
            self.of.reduction = before
        return losses


def build(
    curriculum: Curriculum, epochs: int, data: Data, loss: Loss, device: torch.device, *, data_name: str, loss_name: str
) -> InfoBatch | None:
    """InfoBatch as `data.infobatch` says; None if that is 0.

    Args:
        epochs: of the run.
        data_name, loss_name: of these options, for messages.

    Raises:
        UserError: if the data cannot leave images out, or the loss cannot say what each contributes.
    """
    if curriculum.infobatch == 0:
        return None
    key, without = f"data.infobatch={curriculum.infobatch:g}", "data.infobatch=0 trains on all images"
    check_selectable(key, data_name, data, without)
    losses = unreduced(loss)
    if losses is None or not _averages_to(losses, loss, data.num_classes, device, f"{key}: loss={loss_name}"):
        raise UserError(
            f"{key}: loss={loss_name} cannot say the losses of single images, whose mean it is; one with torch's "
            f"`reduction` can, and {without}"
        )
    return InfoBatch(len(data.train), losses, curriculum.infobatch, curriculum.thinned_epochs(epochs), device)


def _averages_to(losses: Loss, loss: Loss, num_classes: int, device: torch.device, name: str) -> bool:
    """Whether `losses` are one number an image, and `loss` their mean; torch's with class weights is not."""
    logits = torch.randn(TRIED, num_classes, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(TRIED, device=device) % num_classes
    try:
        each, mean = copy.deepcopy(losses)(logits, labels), copy.deepcopy(loss)(logits, labels)
    except Exception as error:
        raise UserError(f'{name}: called with reduction="none": {said(error)}') from error
    single = isinstance(each, torch.Tensor) and each.shape == (TRIED,)
    return single and torch.allclose(each.mean().float(), mean.float(), rtol=1e-4, atol=1e-6)
