"""Warnings of a run that was asked to shrink: that it will not, that it has not, or that nothing is left of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from morphtrain.cost.params import count_params
from morphtrain.prune.when import Option, last_reconfiguration
from morphtrain.state import Run

log = logging.getLogger(__name__)

SIGMAS = 3  # an accuracy within so many standard deviations of what guessing gives is that of guessing


class Outlook:
    """What a run with a penalty is warned of, each at most once.

    Args:
        option: says when channels can go.
        setting: what makes the penalty stronger, as `key=value`.

    Attributes:
        removed: whether anything has been removed so far; a resumed run has to know.
    """

    def __init__(self, option: Option, setting: str) -> None:
        self.option = option
        self.setting = setting
        self.removed = False
        self._guessing = False

    def after_epoch(self, run: Run, removed: bool, reach: Callable[[int], tuple[float, str]]) -> None:
        """Look at what an epoch, and the reconfiguration after it, if there was one, have led to.

        Args:
            removed: whether anything was removed after this epoch.
            reach: is given the last epoch after which channels can go. The share of a layer's strength, at most, that
                the penalty will have taken by then, and the setting with which it would be all.
        """
        self.removed |= removed
        last = last_reconfiguration(self.option, run.config.epochs)
        if last is None:
            return  # `check_reach` has said so
        if self.removed:
            self._check_accuracy(run)
        elif run.epoch == last:
            log.warning(
                "%s: nothing was removed by epoch %d, the last that channels can go after; a larger value, more epochs "
                "or another prune.stop_epoch would remove something",
                *(self.setting, last),
            )
        elif run.epoch == 1:
            share, enough = reach(last)
            if share < 1:
                log.warning(
                    "%s: by epoch %d, the last that channels can go after, the penalty takes at most %.0f %% of what "
                    "they measure: hardly any will go; %s or more could do it",
                    *(self.setting, last, 100 * share, enough),
                )

    def _check_accuracy(self, run: Run) -> None:
        guess = 1 / run.data.num_classes
        spread = math.sqrt(guess * (1 - guess) / len(run.data.train))
        if run.train_accuracy > guess + SIGMAS * spread or self._guessing:
            return
        self._guessing = True
        log.warning(
            "%s: a training accuracy of %.3f is that of guessing, with %.1f %% of the parameters left; a smaller value "
            "leaves more",
            *(self.setting, run.train_accuracy, 100 * count_params(run.model) / run.initial["params"]),
        )
