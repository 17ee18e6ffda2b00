"""A sweep's output: a closing table, charts, the results as YAML, and the command that runs the best trial again."""

from __future__ import annotations

import logging
import math
import shlex
import statistics
import warnings
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
from morphtrain.sweep.trial import BASELINE_ATTR, ERROR_ATTR, METRICS_ATTR, OVERRIDES_ATTR

log = logging.getLogger(__name__)

FEW = 5  # best trials in the table
RESULTS = "optimization_results.yaml"  # the name that Hydra's own sweeper uses


def close(study: optuna.Study, objective: Sequence[str], sweep_dir: Path, config_dir: str | None = None) -> list[Path]:
    """Print the closing table, write charts and results to `sweep_dir`, and return the paths of those files.

    Raises:
        UserError: if no trial ended with a value.
    """
    if not _counts(study)[TrialState.COMPLETE]:
        raise UserError(f"study {study.study_name}: no trial ended with a value; {_failures(study)}")
    best = _best(study)
    console = Console(width=max(100, Console().width), markup=False, highlight=False)
    console.print(_table(study, best, objective))
    searched = _searched(study)
    importance = _importance(searched)
    for line in _lines(study, best, objective, importance, config_dir):
        console.print(line, soft_wrap=True)
    pictures = _pictures(study, searched, objective, sweep_dir, bool(importance))
    paths = [*pictures, _results(best, objective, sweep_dir)]
    console.print(f"pictures and results: {sweep_dir}", soft_wrap=True)
    return paths


def summary(study: optuna.Study, objective: Sequence[str]) -> dict[str, float]:
    """Metrics of the sweep's own MLflow run: how many trials ended in each state, and the best one's objective."""
    counts = _counts(study)
    metrics = {f"trials_{state.name.lower()}": float(number) for state, number in counts.items()}
    best = _best(study)
    if best:
        metrics["best_trial"] = best[0].number
        metrics |= {f"best_{name}": value for name, value in zip(objective, best[0].values, strict=True)}
    return metrics


def _counts(study: optuna.Study) -> Counter[TrialState]:
    return Counter(trial.state for trial in study.get_trials(deepcopy=False))


def _best(study: optuna.Study) -> list[FrozenTrial]:
    """The feasible trials that count: the Pareto front or, with one objective, the `FEW` best, best first."""
    if len(study.directions) > 1:
        return study.best_trials
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    feasible = (trial for trial in trials if all(excess <= 0 for excess in trial.constraints.values()))
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    return sorted(feasible, key=lambda trial: sign * trial.values[0])[:FEW]


def _searched(study: optuna.Study) -> optuna.Study:
    """The trials with a result, except for the baseline, which has no values of the searched keys."""
    searched = optuna.create_study(directions=study.directions)
    completed = study.get_trials(states=(TrialState.COMPLETE,))
    searched.add_trials([trial for trial in completed if BASELINE_ATTR not in trial.user_attrs])
    return searched


def _baseline(study: optuna.Study) -> FrozenTrial | None:
    """Trial 0, if it ran as the baseline and has a result."""
    marked = (trial for trial in study.get_trials(deepcopy=False) if BASELINE_ATTR in trial.user_attrs)
    return next((trial for trial in marked if trial.values), None)


def _failures(study: optuna.Study) -> str:
    reasons = [trial.user_attrs[ERROR_ATTR] for trial in study.trials if ERROR_ATTR in trial.user_attrs]
    return f"the last failed with: {reasons[-1]}" if reasons else "all were stopped early"


def _table(study: optuna.Study, best: Sequence[FrozenTrial], objective: Sequence[str]) -> Table:
    """The baseline and the best trials, one per row."""
    counted = ", ".join(f"{number} {state.name}" for state, number in _counts(study).items())
    table = Table(title=f"study {study.study_name}: {counted}")
    for column in ("trial", *objective, *_shown(objective), "overrides"):
        table.add_column(column, justify="left" if column == "overrides" else "right", overflow="fold")
    baseline = _baseline(study)
    first = [] if baseline is None else [baseline]
    for trial in (*first, *(trial for trial in best if BASELINE_ATTR not in trial.user_attrs)):
        is_baseline = BASELINE_ATTR in trial.user_attrs
        metrics = trial.user_attrs.get(METRICS_ATTR, {})
        table.add_row(
            f"{trial.number} (baseline)" if is_baseline else str(trial.number),
            *(_number(value) for value in trial.values),
            *(_number(metrics.get(name, math.nan)) for name in _shown(objective)),
            " ".join(f"{key}={_number(value)}" for key, value in trial.params.items()),
        )
    return table


def _shown(objective: Sequence[str]) -> list[str]:
    """Metrics that get a column even if they are not objectives."""
    return [name for name in ("train_seconds", "val_accuracy", "params") if name not in objective]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lines(
    study: optuna.Study,
    best: Sequence[FrozenTrial],
    objective: Sequence[str],
    importance: dict[str, float],
    config_dir: str | None,
) -> list[str]:
    lines = []
    baseline = _baseline(study)
    if not best:
        lines.append("no trial is feasible: lower hydra.sweeper.min_accuracy, or search other ranges")
    elif len(objective) == 1 and baseline is not None and best[0].number == baseline.number:
        lines.append("the baseline is the best trial: what was searched does not pay off here")
    elif len(objective) == 1 and baseline is not None:
        ratio = best[0].values[0] / baseline.values[0] if baseline.values[0] else math.nan
        accuracies = [trial.user_attrs[METRICS_ATTR]["val_accuracy"] for trial in (best[0], baseline)]
        lines.append(
            f"{objective[0]}: best / baseline {ratio:.3f}, val_accuracy {accuracies[0]:.4f} / {accuracies[1]:.4f}; "
            f"from one run each, the best of {len(study.trials)}: repeat both with other seeds before you trust this"
        )
    if importance:
        shares = ", ".join(f"{key} {share:.2f}" for key, share in importance.items())
        lines.append(f"importance for {objective[0]} (fANOVA): {shares}")
    if median := _seconds(study):
        lines.append(f"a trial took {median:.1f} s (median), all trials together {_seconds(study, sum):.0f} s")
    if best:
        lines.append(f"to run the best trial again:  python -m morphtrain.run {rerun(best[0], config_dir)}")
    return lines


def _seconds(study: optuna.Study, of: Any = statistics.median) -> float:
    durations = [trial.duration.total_seconds() for trial in study.trials if trial.duration is not None]
    return float(of(durations)) if durations else 0.0


def rerun(trial: FrozenTrial, config_dir: str | None = None) -> str:
    """Arguments for `python -m morphtrain.run` that repeat a trial; `config_dir` as the sweep was given it."""
    own = [] if config_dir is None else ["--config-dir", config_dir]
    return shlex.join([*own, *trial.user_attrs[OVERRIDES_ATTR]])


def _evaluator() -> optuna.importance.FanovaImportanceEvaluator:
    return optuna.importance.FanovaImportanceEvaluator(seed=0)


def _importance(searched: optuna.Study) -> dict[str, float]:
    """Each searched key's share of the first objective's variance (fANOVA); empty if there are too few trials."""
    varied = {key for trial in searched.trials for key in trial.params}
    if len(searched.trials) < 4 or len(varied) < 2:
        return {}
    target = None if len(searched.directions) == 1 else (lambda trial: trial.values[0])
    try:
        return dict(optuna.importance.get_param_importances(searched, evaluator=_evaluator(), target=target))
    except (ValueError, RuntimeError) as error:  # all values equal, or no key in all trials
        log.info("no importances of the searched keys: %s", error)
        return {}


def _pictures(
    study: optuna.Study, searched: optuna.Study, objective: Sequence[str], sweep_dir: Path, important: bool
) -> list[Path]:
    """Optuna's own charts as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as charts

    several = len(objective) > 1
    first: dict[str, Any] = {"target": lambda trial: trial.values[0], "target_name": objective[0]} if several else {}
    named = first or {"target_name": objective[0]}
    wanted: dict[str, Callable[[], Any]] = {
        "history": lambda: charts.plot_optimization_history(study, **named),
        "parallel": lambda: charts.plot_parallel_coordinate(searched, **named),
        "slices": lambda: charts.plot_slice(searched, **named),
    }
    if important:
        wanted["importance"] = lambda: charts.plot_param_importances(searched, _evaluator(), **named)
    if several:
        wanted["pareto"] = lambda: charts.plot_pareto_front(study, target_names=list(objective))
    paths = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these charts are experimental; all values of an axis are equal
        for name, draw in wanted.items():
            draw()
            paths.append(sweep_dir / f"{name}.png")
            figure: Any = pyplot.gcf()
            figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
            pyplot.close("all")
    return paths


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
