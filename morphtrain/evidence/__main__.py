"""Statistics of your own runs.

python -m morphtrain.evidence table multirun/2026-01-31/12-00-00 --csv runs.csv
python -m morphtrain.evidence test multirun/2026-01-31/12-00-00 --by prune --metric train_seconds --paired seed
python -m morphtrain.evidence fit multirun/2026-01-31/12-00-00 --x model.blocks --y params
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphtrain.errors import UserError
from morphtrain.evidence import formats, samples, words
from morphtrain.evidence.calibration import CALIBRATED, RAW_TIMES
from morphtrain.flags import Parser
from morphtrain.wording import command_name

if TYPE_CHECKING:
    import pandas as pd

METRIC = "test_accuracy"
TIMES = {*RAW_TIMES, "median_epoch_seconds", *CALIBRATED.values()}
RUNS_HELP = (
    "directories of runs, or directories with runs below them, or a store of MLflow's, as sqlite:///mlflow.db or "
    "http://127.0.0.1:5000"
)
BY_HELP = (
    "what groups the runs: a config key, or arm; the first group, the reference, is that of the arm which an "
    "experiment declares first, otherwise of the run found first"
)
MARGIN_HELP = (
    "what would matter, chosen before the runs: for an accuracy a difference (0.01), for anything else a share of the "
    "first group's (0.05); tests whether the others are no worse, and whether they are equivalent"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 if it could say something, 1 otherwise."""
    given = _parser().parse_args(arguments)
    try:
        given.command(given)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=command_name("evidence"),
        description="Statistics of the last epochs of runs; offline, from what the runs have recorded.",
    )
    commands = parser.add_subparsers(required=True, metavar="table|test|fit")
    for name, command, what in (
        ("table", _table, "the last record of each run"),
        (
            "test",
            _test,
            "compare groups of runs, of more than two every pair: effect, interval, test",
        ),
        ("fit", _fit, "the least-squares line of a metric against a config key or metric, with diagnostics"),
    ):
        each = commands.add_parser(name, help=what, description=what)
        each.set_defaults(command=command)
        each.add_argument("runs", nargs="+", metavar="RUNS", help=RUNS_HELP)
        each.add_argument("--study", help="only runs of this study; of an MLflow store only")
        each.add_argument("--mlflow-experiment", metavar="NAME", default="morphtrain", help="%(default)s by default")
        if name == "table":
            each.add_argument("--csv", type=Path, metavar="FILE", help="write all columns there")
        elif name == "test":
            each.add_argument("--by", required=True, metavar="KEY", help=BY_HELP)
            each.add_argument("--metric", default=METRIC, help="of the last epoch; %(default)s by default")
            each.add_argument("--paired", metavar="KEY", help="what pairs the runs of different groups, as seed")
            each.add_argument("--margin", type=float, help=MARGIN_HELP)
        else:
            each.add_argument("--x", required=True, metavar="KEY", help="a config key or metric")
            each.add_argument("--y", required=True, metavar="METRIC", help="a metric of the last epoch")
    return parser


def _table(given: argparse.Namespace) -> None:
    table = _ends(given)
    if given.csv is not None:
        from morphtrain.files import write_atomically

        write_atomically(given.csv, table.to_csv(index=False).encode())
        print(f"{given.csv}: {len(table)} runs, {len(table.columns)} columns")
        return
    wanted = ("arm", "seed", "finished", "contended_epochs", "epoch", "calibrated_train_seconds", "train_seconds")
    shown = [name for name in ("run", *wanted, "val_accuracy", METRIC, "params") if name in table]
    print(table[shown].to_string(index=False, float_format="{:.6g}".format))


def _fit(given: argparse.Namespace) -> None:
    from morphtrain.evidence.regressions import fit_line

    table = _finished(given)
    points = samples.numbers(table, given.x, given.y)
    _say_left_out(len(table) - len(points), len(table), f"without a number for {given.x} or {given.y}")
    with _as_user_error():
        print(fit_line([x for x, _ in points], [y for _, y in points], names=(given.x, given.y)))


def _test(given: argparse.Namespace) -> None:
    from morphtrain.evidence import comparisons, variance
    from morphtrain.evidence.analyses import values

    if given.margin is not None and not given.margin > 0:
        raise UserError(f"--margin {given.margin:g}: must be above 0")
    table = _in_declared_order(_finished(given))
    scale = values.scale(given.metric)
    _say_disturbed(table, given.metric)
    for group in formats.mixed(table, given.by) if given.by in table else ():
        print(f"note: auto chose differently in the runs of one group, {group}")
    for group in formats.mixed_processes(table, given.by) if given.by in table else ():
        print(f"note: the runs of one group had different numbers of processes, {group}")
    groups: Any = samples.by_group(table, given.by, given.metric)
    compare: tuple[Any, Any] = comparisons.compare_groups, variance.compare_many
    if given.paired is not None:
        groups = samples.by_pair(table, given.by, given.metric, given.paired)
        compare = comparisons.compare_pairs, variance.compare_blocks
    first, second, *more = groups
    if more:
        print(f"every pair of {len(groups)} groups is compared; the first is {first}")
    with _as_user_error():
        if not more:
            print(compare[0](groups[second], groups[first], scale, names=(second, first)))
        elif alike := variance.nothing_to_test(groups, scale):
            print(f"{len(groups)} groups: {alike}: there is nothing to test")
            for a, b in itertools.combinations(groups, 2):
                if not comparisons.are_equal(groups[a], groups[b]):
                    print(f"  {compare[0](groups[b], groups[a], scale, names=(b, a))}")
        else:
            print(compare[1](groups, scale))
        if given.margin is not None:
            _print_margin(groups, scale, given)


def _say_disturbed(table: pd.DataFrame, metric: str) -> None:
    """Whether times compare where others have used the machine."""
    disturbed = table[table["contended_epochs"] > 0]
    calibrates = bool(disturbed["calibrated"].all())
    if disturbed.empty or metric not in TIMES or (calibrates and metric not in RAW_TIMES):
        return
    verdict = "calibrated times do" if calibrates else "in some calibrated times do not allow for it either"
    print(f"note: others have disturbed {len(disturbed)} of these runs, so {metric} may not compare; {verdict}")


def _print_margin(groups: Mapping[str, Any], scale: str, given: argparse.Namespace) -> None:
    from morphtrain.evidence import comparisons, margins

    within: Any = margins.groups_within if given.paired is None else margins.pairs_within
    worse = "below" if words.better(given.metric) == words.MORE else "above"
    first, *others = groups
    for other in others:
        if comparisons.are_equal(groups[other], groups[first]):
            print(f"{other} - {first}: all alike, difference 0: no worse, and equivalent")
            continue
        for sides in ((worse,), ("below", "above")):
            bounds = dict.fromkeys(sides, given.margin)
            print(within(groups[other], groups[first], scale, **bounds, names=(other, first)))


def _ends(given: argparse.Namespace) -> pd.DataFrame:
    from morphtrain.evidence.records import ends, load

    return ends(load(*given.runs, study=given.study, mlflow_experiment=given.mlflow_experiment))


def _finished(given: argparse.Namespace) -> pd.DataFrame:
    table = _ends(given)
    finished = table[table["finished"]]
    if finished.empty:
        raise UserError(f"{' '.join(given.runs)}: none of {len(table)} runs has come to its end")
    _say_left_out(len(table) - len(finished), len(table), "which did not come to their end")
    return finished


def _in_declared_order(table: pd.DataFrame) -> pd.DataFrame:
    """The runs of one experiment in the order in which it declares its arms; others as they were found."""
    from morphtrain.evidence import experiment

    directories = {Path(run).parent.parent for run in table["run"]}
    if len(directories) != 1 or not (directory := directories.pop()).joinpath(experiment.FILE).exists():
        return table
    places = {arm: place for place, arm in enumerate(experiment.load(directory).arms)}
    return table.sort_values("arm", key=lambda arms: arms.map(places), kind="stable")


def _say_left_out(count: int, runs: int, why: str) -> None:
    if count:
        print(f"note: {count} of {runs} runs left out, {why}")


@contextlib.contextmanager
def _as_user_error() -> Iterator[None]:
    """What the statistics refuse, the user can mend: other runs, another metric."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
