"""A sweep's output: a closing table, charts, the results as YAML, and the command that runs the best trial again."""

from __future__ import annotations

import logging
import math
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from omegaconf import OmegaConf
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from morphtrain.errors import UserError
from morphtrain.evidence.calibration import CALIBRATED
from morphtrain.schema.config import TO_ACCURACY
from morphtrain.sweep import charts
from morphtrain.sweep.attributes import FIRST, Attributes
from morphtrain.sweep.comparison import Comparison, compared, completed, is_feasible
from morphtrain.timing.summaries import NEVER
from morphtrain.wording import counted

log = logging.getLogger(__name__)

FEW = 5  # best trials in the table
REPEAT = "before you trust this, repeat it and {} with other seeds: the command below with -m and seed=2,3,4"
MORE_TO_COME = "seeds that the search never saw tell below whether that is luck"
RESULTS = "optimization_results.yaml"  # the name that Hydra's own sweeper uses


def close(
    study: optuna.Study,
    objective: Sequence[str],
    sweep_dir: Path,
    repeating: Callable[[FrozenTrial], list[str]],
    config_dir: str | None = None,
    more_to_come: bool = False,
) -> list[Path]:
    """Print the closing table, write charts and results to `sweep_dir`, and return the paths of those files.

    Args:
        repeating: gives the overrides of a single run that repeats a trial. Those stored with it are not used: the line
            would have the user run what anybody who can write to the study has put there.

    Raises:
        UserError: if no trial ended with a value.
    """
    if not _counts(study)[TrialState.COMPLETE]:
        raise UserError(f"study {study.study_name}: no trial ended with a value; {_failures(study)}")
    comparison = compared(study, objective)
    best = _best(comparison.study)
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    console.print(_table(comparison, best))
    searched = comparison.reached(comparison.searched)
    importance = _importance(searched)
    advice = MORE_TO_COME if more_to_come else REPEAT
    for line in _lines(comparison, best, importance, len(completed(searched)), repeating, config_dir, advice):
        console.print(line, soft_wrap=True)
    shown = comparison.reached(comparison.study)
    pictures = charts.draw(shown, searched, comparison.objective, sweep_dir, bool(importance))
    paths = [*pictures, _results([study.trials[trial.number] for trial in best], objective, sweep_dir)]
    console.print(f"pictures and results: {sweep_dir}", soft_wrap=True)
    return paths


def summary(study: optuna.Study, objective: Sequence[str]) -> dict[str, float]:
    """Metrics of the sweep's own MLflow run: how many trials ended in each state, and the best one's objective."""
    counts = _counts(study)
    metrics = {f"trials_{state.name.lower()}": float(number) for state, number in counts.items()}
    comparison = compared(study, objective)
    metrics["trials_contended"] = comparison.contended
    best = _best(comparison.study)
    if best:
        metrics["best_trial"] = best[0].number
        metrics |= {f"best_{name}": value for name, value in zip(comparison.objective, best[0].values, strict=True)}
    return metrics


def _counts(study: optuna.Study) -> Counter[TrialState]:
    return Counter(trial.state for trial in study.get_trials(deepcopy=False))


def _best(study: optuna.Study) -> list[FrozenTrial]:
    """The feasible trials that count: the Pareto front or, with one objective, the `FEW` best, best first."""
    if len(study.directions) > 1:
        return study.best_trials
    return _ranked(study)[:FEW]


def best_searched(comparison: Comparison, count: int) -> list[FrozenTrial]:
    """The best feasible trials that are no baselines, the best first; of a study with one objective."""
    return [trial for trial in _ranked(comparison.study) if Attributes(trial).baseline is None][:count]


def _ranked(study: optuna.Study) -> list[FrozenTrial]:
    """The feasible trials, the best first."""
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    return sorted(filter(is_feasible, completed(study)), key=lambda trial: sign * trial.values[0])


def _baselines(study: optuna.Study) -> list[FrozenTrial]:
    """Those that have a result."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.values and Attributes(trial).baseline]


def _best_baseline(study: optuna.Study) -> FrozenTrial | None:
    """The best of those that are feasible; trial 0 if none is, None if it has no result either."""
    ranked = [] if len(study.directions) > 1 else _ranked(study)
    feasible = (trial for trial in ranked if Attributes(trial).baseline)
    return next(feasible, next((trial for trial in _baselines(study) if Attributes(trial).is_baseline), None))


def _failures(study: optuna.Study) -> str:
    reasons = [error for trial in study.trials if (error := Attributes(trial).error)]
    return f"the last failed with: {reasons[-1]}" if reasons else "all were stopped early"


def _table(comparison: Comparison, best: Sequence[FrozenTrial]) -> Table:
    """The baseline and the best trials, one per row."""
    study, objective = comparison.study, comparison.objective
    states = ", ".join(f"{number} {state.name}" for state, number in _counts(study).items())
    table = Table(title=f"study {study.study_name}: {states}")
    contended = ["contended epochs"] if comparison.contended else []
    for column in ("trial", *objective, *_shown(objective), *contended, "overrides"):
        table.add_column(column, justify="left" if column == "overrides" else "right", overflow="fold")
    for trial in (*_baselines(study), *(trial for trial in best if not Attributes(trial).baseline)):
        attributes = Attributes(trial)
        metrics = attributes.metrics
        disturbed = f"{len(attributes.contended)} of {_number(metrics.get('epoch', math.nan))}"
        table.add_row(
            f"{trial.number} ({attributes.baseline})" if attributes.baseline else str(trial.number),
            *(_value(name, value) for name, value in zip(objective, trial.values, strict=True)),
            *(_number(metrics.get(name, math.nan)) for name in _shown(objective)),
            *[disturbed for _ in contended],
            " ".join(f"{key}={_number(value)}" for key, value in trial.params.items()),
        )
    return table


def _shown(objective: Sequence[str]) -> list[str]:
    """Metrics that get a column even if they are not objectives."""
    return [name for name in ("train_seconds", "val_accuracy", "params") if name not in objective]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _value(name: str, value: float) -> str:
    missed = name in TO_ACCURACY and value >= NEVER
    return f"missed by {value / NEVER - 1:.4f}" if missed else _number(value)


def _lines(
    comparison: Comparison,
    best: Sequence[FrozenTrial],
    importance: dict[str, float],
    trials: int,
    repeating: Callable[[FrozenTrial], list[str]],
    config_dir: str | None,
    advice: str,
) -> list[str]:
    study, objective = comparison.study, comparison.objective
    lines = [*_doubts(comparison)]
    if not best:
        lines.append("no trial is feasible: lower hydra.sweeper.min_accuracy, or search other ranges")
    elif len(objective) == 1 and (verdict := _verdict(comparison, best[0], advice)):
        lines.append(verdict)
    tested = Attributes(best[0]).metrics.get("test_accuracy") if best and len(objective) == 1 else None
    if tested is not None:
        lines.append(f"test_accuracy of trial {best[0].number}, on images that no decision has seen: {tested:.4f}")
    if importance:
        shares = ", ".join(f"{key} {share:.2f}" for key, share in importance.items())
        lines.append(f"importance for {objective[0]} (fANOVA of {counted(trials, 'trial')}): {shares}")
    if median := _seconds(study):
        lines.append(f"a trial took {median:.1f} s (median), all trials together {_seconds(study, sum):.0f} s")
    if best:
        lines.append(f"to run the best trial again:  {rerun(best[0], repeating, config_dir)}")
    return lines


def _doubts(comparison: Comparison) -> list[str]:
    """What speaks against comparing these trials."""
    lines = []
    unchanged, meant = comparison.unchanged
    if unchanged:
        lines.append(
            f"{'no trial' if unchanged == meant else f'{unchanged} of {meant} trials never'} changed its network: see "
            "whether epochs reaches prune.start_epoch, grow.at_epochs or grow.patience, or raise prune.lasso_ratio"
        )
    infeasible = sum(any(excess > 0 for excess in t.constraints.values()) for t in completed(comparison.study))
    if infeasible:
        lines.append(f"{infeasible} of {len(completed(comparison.study))} trials miss hydra.sweeper.min_accuracy")
    if comparison.contended:
        if not comparison.fair:
            verdict = f"their times do not compare, for {', '.join(comparison.objective)} does not allow for it"
        elif set(comparison.objective) & set(CALIBRATED.values()):
            verdict = "trials are compared by calibrated times"
        else:
            verdict = "their train_seconds do not compare"
        trials = len(completed(comparison.study))
        lines.append(f"{comparison.contended} of {trials} trials had contended epochs: {verdict}")
    return lines


def _verdict(comparison: Comparison, best: FrozenTrial, advice: str) -> str:
    """The best trial against the best baseline, and what next; "" where that would say nothing."""
    study, baseline = comparison.study, _best_baseline(comparison.study)
    unchanged, meant = comparison.unchanged
    as_it_was = unchanged == meant and Attributes(best).changed is not None  # the same network under another name
    if baseline is None or not comparison.fair or as_it_was:
        return ""
    if len(completed(study)) == 1:
        return "only the baseline has a result: there is nothing yet to compare it with"
    if best.number == baseline.number:
        ended = len(completed(study))
        first = f"{_called(baseline)} is the best of {counted(ended, 'trial')}, from one run each"
        return f"{first}; {advice.format('the next best')}"
    ratio = best.values[0] / baseline.values[0] if baseline.values[0] else math.nan
    accuracies = [Attributes(trial).metrics.get("val_accuracy", math.nan) for trial in (best, baseline)]
    return (
        f"{comparison.objective[0]}: best / {_called(baseline).removeprefix('the ')} {ratio:.3f}, "
        f"val_accuracy {accuracies[0]:.4f} / {accuracies[1]:.4f}; "
        f"from one run each, the best of {len(study.trials)}; {advice.format(_called(baseline))}"
    )


def _called(baseline: FrozenTrial) -> str:
    """A baseline in a sentence."""
    name = Attributes(baseline).baseline
    return "the baseline" if name == FIRST else f"the baseline {name}"


def _seconds(study: optuna.Study, of: Any = statistics.median) -> float:
    durations = [trial.duration.total_seconds() for trial in study.trials if trial.duration is not None]
    return float(of(durations)) if durations else 0.0


def rerun(trial: FrozenTrial, repeating: Callable[[FrozenTrial], list[str]], config_dir: str | None) -> str:
    """The command that repeats a trial; `config_dir` as the sweep was given it."""
    own = [] if config_dir is None else ["--config-dir", config_dir]
    try:
        return f"python -m morphtrain.run {shlex.join([*own, *repeating(trial)])}"
    except UserError as error:  # it was put into the study by something else than this sweep
        return f"trial {trial.number} cannot be repeated: {error}"


def _importance(searched: optuna.Study) -> dict[str, float]:
    """Each searched key's share of the first objective's variance (fANOVA); empty if there are too few trials."""
    varied = {key for trial in searched.trials for key in trial.params}
    if len(completed(searched)) < 4 or len(varied) < 2:
        return {}
    target = None if len(searched.directions) == 1 else (lambda trial: trial.values[0])
    try:
        return dict(optuna.importance.get_param_importances(searched, evaluator=charts.evaluator(), target=target))
    except (ValueError, RuntimeError) as error:  # all values equal, or no key in all trials
        log.info("no importances of the searched keys: %s", error)
        return {}


def _results(best: Sequence[FrozenTrial], objective: Sequence[str], sweep_dir: Path) -> Path:
    """Write the same file as Hydra's Optuna sweeper."""
    results: dict[str, Any] = {"name": "optuna"}
    if len(objective) == 1 and best:
        results |= {"best_params": best[0].params, "best_value": best[0].values[0]}
    else:
        results["solutions"] = [{"params": trial.params, "values": trial.values} for trial in best]
    path = sweep_dir / RESULTS
    OmegaConf.save(OmegaConf.create(results), path)
    return path
