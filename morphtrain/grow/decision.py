"""What to do next when a network is trained by rules instead of a fixed plan (section 3.5 of the thesis)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from morphtrain.grow.when import epochs_without_gain, smoothed
from morphtrain.wording import counted

Action = Literal["wait", "grow", "prune", "lower_lr", "stop"]
Record = Mapping[str, float]


@dataclass(frozen=True)
class Rules:
    """The thresholds of the rules; accuracies lie in 0..1."""

    patience: int  # epochs between two decisions, and the length of a plateau
    smoothing: float  # share of the past in smoothed metrics
    low_accuracy: float  # on the training data: below it a network underfits
    high_accuracy: float  # above it there is nothing left to learn
    keep_fraction: float  # of the channels: a network that kept fewer was not too small


@dataclass(frozen=True)
class Situation:
    """What the rules look at.

    Args:
        history: records since the last decision that changed something. Those of the last epoch may lack
            `val_accuracy` and `val_loss`, since a network is evaluated after the change.
        kept: the share of the channels that pruning has left since the last growth.
        can_grow, can_prune: whether there is room to grow, and a method to prune harder with.
        lr_lowered: whether the learning rate was lowered since the structure last changed.
        helped: whether the last change of structure, or a lower learning rate since, raised validation accuracy.
    """

    history: Sequence[Record]
    kept: float
    can_grow: bool
    can_prune: bool
    lr_lowered: bool
    helped: bool


@dataclass(frozen=True)
class Decision:
    """An action, and the numbers that led to it."""

    action: Action
    reason: str


def decide(now: Situation, rules: Rules) -> Decision:
    """Choose one action: never the learning rate and the structure together.

    Overfitting (validation loss rises while training loss falls, or training accuracy is high): prune harder.
    Underfitting (training accuracy low and no longer rising, and little was pruned): grow. Saturation (smoothed
    validation accuracy flat for `patience` epochs): first a lower learning rate, then another structure, and if neither
    helped, stop.
    """
    if len(now.history) < rules.patience:
        return Decision("wait", f"{len(now.history)} of {counted(rules.patience, 'epoch')} since the last decision")
    accuracy = now.history[-1]["train_accuracy"]
    rising = _rising(now.history, rules)
    if now.can_prune and (rising or accuracy >= rules.high_accuracy):
        return Decision("prune", f"overfitting: train_accuracy {accuracy:.4f}" + (f", {rising}" if rising else ""))
    train_flat = epochs_without_gain(now.history, rules.smoothing, "train_accuracy")
    if now.can_grow and accuracy < rules.low_accuracy and train_flat >= rules.patience // 2 and _kept(now, rules):
        return Decision(
            "grow", f"underfitting: train_accuracy {accuracy:.4f} flat for {train_flat}, {_kept(now, rules)}"
        )
    evaluated = [record for record in now.history if "val_accuracy" in record]
    flat = epochs_without_gain(evaluated, rules.smoothing)
    if flat < rules.patience - 1:
        return Decision("wait", f"val_accuracy flat for {counted(flat, 'epoch')}")
    reason = f"saturation: val_accuracy flat for {counted(flat, 'epoch')} at {evaluated[-1]['val_accuracy']:.4f}"
    if not now.lr_lowered:
        return Decision("lower_lr", reason)
    if not now.helped:
        return Decision("stop", f"{reason}; neither a lower learning rate nor another structure helped")
    if now.can_grow and (accuracy < rules.high_accuracy or not now.can_prune):
        return Decision("grow", f"{reason}, train_accuracy {accuracy:.4f}")
    if now.can_prune:
        return Decision("prune", f"{reason}, train_accuracy {accuracy:.4f}")
    return Decision("stop", f"{reason}; there is neither room to grow nor a method to prune with")


def _kept(now: Situation, rules: Rules) -> str:
    return f"{now.kept:.2f} of the channels kept" if now.kept >= rules.keep_fraction else ""


def _rising(history: Sequence[Record], rules: Rules) -> str:
    """How validation loss rose while training loss fell over the last `patience` epochs; "" if they did not."""
    val = smoothed([r["val_loss"] for r in history if "val_loss" in r], rules.smoothing)[-rules.patience :]
    train = [r["train_loss"] for r in history][-rules.patience :]
    rose = len(val) > 1 and all(later > earlier for earlier, later in itertools.pairwise(val))
    return f"val_loss {val[0]:.4f} -> {val[-1]:.4f}" if rose and train[-1] < train[0] else ""
