"""What a sweep shows as it goes on: a line for each trial that has ended and, on a terminal, one that stays below."""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.live import Live
from rich.text import Text

from morphtrain import terminal
from morphtrain.sweep.attributes import Attributes
from morphtrain.sweep.comparison import Comparison, compared, is_feasible
from morphtrain.sweep.ranking import best_trials, value_of
from morphtrain.wording import one_of_all, to_go

PAST_US = ("joblib", "ray")  # launchers whose jobs write to the terminal by themselves, into whatever stays there
ENDED = {TrialState.COMPLETE: "with a result", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}


class Display:
    """How far a study is, whichever workers run its trials: all counts are the study's own.

    Args:
        study: is read at every `look`, and at no other time.
        objective: its metrics.
        total: number of trials that it is to have.
        at_once: number of trials that this worker runs side by side.
        launcher: the option of `hydra/launcher`.
    """

    def __init__(
        self, study: optuna.Study, objective: Sequence[str], total: int, at_once: int, launcher: str = "basic"
    ) -> None:
        self.study, self.objective, self.total, self.at_once = study, objective, total, at_once
        self.stays = launcher not in PAST_US and sys.stdout.isatty() and sys.stderr.isatty()
        self.known: set[int] | None = None  # numbers of the trials whose end was shown
        self.progress = ""
        self.end: float | None = None  # when the study will be done, on the monotonic clock

    def look(self, own: Collection[int]) -> None:
        """Print a line for each trial that has ended since the last look; at the first look, what was there already.

        Args:
            own: ids of the trials that this worker is running.
        """
        trials = self.study.get_trials(deepcopy=False)
        others = sum(trial.state == TrialState.RUNNING and trial._trial_id not in own for trial in trials)
        total = max(self.total, len(trials))
        left = seconds_left(trials, total, self.at_once + others, datetime.now())
        self.end = None if left is None else time.monotonic() + left
        ended = {trial.number: trial for trial in trials if trial.state.is_finished()}
        if ended.keys() == self.known:
            return
        comparison = compared(self.study, self.objective)
        self.progress = f"{self.study.study_name}: {_counted(trials, total)}{_best(comparison)}"
        if self.known is None and ended:
            print(self._line(), flush=True)
        new = [] if self.known is None else [trial for number, trial in ended.items() if number not in self.known]
        for place, trial in enumerate(new, len(ended) - len(new) + 1):
            print(one_of_all(place, total, f"trial {trial.number}", _said(trial, comparison), left), flush=True)
        self.known = set(ended)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """On a terminal, keep a line at its end meanwhile, below whatever is printed; elsewhere do nothing."""
        if not self.stays:
            yield
            return

        def line() -> Text:
            return Text(self._line(), no_wrap=True, overflow="ellipsis")

        # No more often than the bar of an epoch: the drawing thread shares the interpreter with what is being timed.
        with Live(get_renderable=line, console=terminal.drawing(), transient=True, refresh_per_second=2):
            yield

    def _line(self) -> str:
        left = "" if self.end is None else f"  ({to_go(self.end - time.monotonic())})"
        return self.progress + left


def seconds_left(trials: Sequence[FrozenTrial], total: int, side_by_side: int, now: datetime) -> float | None:
    """The seconds until a study has its total, as its trials so far took theirs; None before the first, after the last.

    A trial to come takes the median of those with a result, or of those stopped early, or of those that failed, each as
    likely as it was so far. One that took another's values took no time.

    Args:
        total: number of trials, those that have ended included.
        side_by_side: number of trials that run at the same time, over all workers.
        now: against which running trials have begun.
    """
    kinds: dict[object, list[float]] = {}
    for trial in trials:
        if trial.state.is_finished() and trial.duration is not None:
            kind = trial.state if Attributes(trial).same_run_as is None else "same run"
            kinds.setdefault(kind, []).append(trial.duration.total_seconds())
    left = total - sum(trial.state.is_finished() for trial in trials)
    if not kinds or left <= 0:
        return None
    ended = sum(map(len, kinds.values()))
    expected = sum(len(seconds) * statistics.median(seconds) for seconds in kinds.values()) / ended
    begun = [t.datetime_start for t in trials if t.state == TrialState.RUNNING and t.datetime_start is not None]
    spent = sum(min(max((now - start).total_seconds(), 0.0), expected) for start in begun)
    return (left * expected - spent) / min(side_by_side, left)


def _counted(trials: Sequence[FrozenTrial], total: int) -> str:
    """`7 of 20 trials, 1 stopped early`."""
    states = Counter(trial.state for trial in trials)
    ended = sum(states[state] for state in ENDED)
    more = "".join(f", {states[state]} {what}" for state, what in ENDED.items() if 0 < states[state] < ended)
    return f"{ended} of {total} trials{more}"


def _best(comparison: Comparison) -> str:
    found = best_trials(comparison.study, 1)
    if not found:
        return ""
    if len(comparison.objective) > 1:
        return f"; front so far: trials {', '.join(str(trial.number) for trial in found)}"
    (name,), (best,) = comparison.objective, found
    return f"; best so far: trial {best.number}, {name} {value_of(name, best.values[0])}"


def _said(trial: FrozenTrial, comparison: Comparison) -> str:
    """How a trial has ended."""
    attributes = Attributes(trial)
    if attributes.same_run_as is not None:
        return f" the same run as trial {attributes.same_run_as}, whose values it takes"
    if trial.state == TrialState.PRUNED:
        return f" stopped after epoch {trial.last_step}"
    if trial.state == TrialState.FAIL:
        return " failed"
    values = comparison.study.get_trials(deepcopy=False)[trial.number].values
    texts = {name: value_of(name, value) for name, value in zip(comparison.objective, values, strict=True)}
    metrics = attributes.metrics
    texts |= {name: f"{metrics[name]:.6g}" for name in ("val_accuracy", "params") if name in metrics.keys() - texts}
    text = "".join(f"  {name} {value}" for name, value in texts.items())
    if not is_feasible(trial):
        return f"{text}  infeasible"
    among = any(best.number == trial.number for best in best_trials(comparison.study, 1))
    return text + ("  the best so far" if among else "")
