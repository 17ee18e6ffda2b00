"""The records of runs as one tidy table, from their directories or from MLflow.

ends(load("experiments/blocks_batch-small", "outputs/2026-01-31"))[["arm", "seed", "test_accuracy"]]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphtrain.errors import UserError, first_line
from morphtrain.evidence.calibration import is_calibrated
from morphtrain.plain_data import mismatch

if TYPE_CHECKING:
    import pandas as pd

FILE = "records.jsonl"
LEFT_AT_THE_END = "run.png"  # by a run that was not interrupted
DECLARATION = "experiment.yaml"  # in the directory of an experiment, above <seed>/<arm>/
CONFIG = Path(".hydra", "config.yaml")  # missing with hydra.output_subdir=null

LARGEST = 2**63  # larger whole numbers are no metric, and no float holds the largest of them

# Keys that do not change what is computed.
IMMATERIAL = (
    *("tracking", "resume", "trial", "objective", "timing", "process_timeout"),
    *("data.root", "data.download", "data.num_workers"),
    *("experiment", "size"),  # presets, whose keys are there by themselves
)


@dataclass(frozen=True)
class RunRecords:
    """A run's records and where it belongs; `experiment` and `arm` are "" if it belongs to no experiment."""

    run: str  # its directory, or its id in MLflow
    experiment: str
    arm: str
    finished: bool
    config: Mapping[str, Any]  # by dotted keys; a group's option under the group's name
    history: Sequence[Mapping[str, float]]


def read_records(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of every epoch of a run, by their names in MLflow, in the order of epochs.

    A last line that is cut off is an epoch that is being written or was interrupted there: the run does not have it.

    Raises:
        OSError: for a directory without records.
        UserError: naming the file and the line, for records that are damaged.
    """
    path = run_dir / FILE
    lines = path.read_text(errors="replace").split("\n")
    complete = lines if lines[-1] and _is_json(lines[-1]) else lines[:-1]
    records: list[dict[str, float]] = []
    for number, line in enumerate(complete, 1):
        record = _record(line, f"{path}, line {number}")
        if records and record["epoch"] <= records[-1]["epoch"]:
            raise UserError(f"{path}, line {number}: epoch {record['epoch']} after epoch {records[-1]['epoch']}")
        records.append(record)
    return records


def _record(line: str, where: str) -> dict[str, float]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged, it is no JSON ({error})") from error
    if wrong := mismatch(record, {"epoch": int}, "the record") or mismatch(record, dict[str, float], "the record"):
        raise UserError(f"{where}: damaged, {wrong}")
    if huge := [name for name, value in record.items() if isinstance(value, int) and abs(value) > LARGEST]:
        raise UserError(f"{where}: damaged, {huge[0]} is no number of a record")
    return dict(record)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def load(*sources: str | Path, study: str | None = None, mlflow_experiment: str = "morphtrain") -> pd.DataFrame:
    """A row for each epoch of each run, in the order of sources, paths (2 before 10) and epochs.

    Columns: `run` (its directory, or its id in MLflow); `experiment` and `arm`, as its place below an experiment's
    directory says ("" and what differs from the other runs, apart from the seed, if it has none); `seed` (missing if
    there is no config); `finished` (whether the run came to its end); `contended_epochs` (how many of the run's epochs
    others have disturbed); `calibrated` (whether calibrated times allow for that); every metric; every config value
    that differs between the runs, by its dotted key, a group's option under the group's name. A run that is found twice
    is there once.

    Args:
        sources: run directories, directories with runs below them, or addresses of MLflow's stores (`sqlite:///mlflow.db`,
            `http://127.0.0.1:5000`).
        study: of an MLflow store, only runs whose tag `study` this is.
        mlflow_experiment: the experiment of MLflow's in which the runs are.

    Raises:
        UserError: for a source without runs, damaged records, or a store that cannot be read.
    """
    import pandas as pd

    runs: dict[str, RunRecords] = {}
    for source in sources:
        is_address = "://" in str(source)
        found = _stored(str(source), mlflow_experiment, study) if is_address else _below(Path(source))
        runs.update((run.run if is_address else str(Path(run.run).resolve()), run) for run in found)
    if not runs:
        raise UserError("no runs: name directories of runs, or a store of MLflow's")
    configs = [run.config for run in runs.values()]
    differing = _differing(configs)
    telling = _telling(configs, differing)
    rows = [row for run in runs.values() for row in _rows(run, differing, telling)]
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def ends(table: pd.DataFrame) -> pd.DataFrame:
    """The last row of each run, in the order of runs; the index is new."""
    return table.groupby("run", sort=False).tail(1).reset_index(drop=True)


def _rows(run: RunRecords, differing: Sequence[str], telling: Sequence[str]) -> Iterator[dict[str, Any]]:
    metrics = {name for record in run.history for name in record}
    settings = {f"config.{key}" if key in metrics else key: run.config.get(key) for key in differing if key != "seed"}
    place = {
        "run": run.run,
        "experiment": run.experiment,
        "arm": run.arm or _described(run.config, telling),
        "seed": run.config.get("seed"),
        "finished": run.finished,
        "contended_epochs": sum(bool(record.get("contended")) for record in run.history),
        "calibrated": is_calibrated(run.history),
    }
    for record in run.history:
        measured = {f"metric.{name}" if name in place else name: value for name, value in record.items()}
        yield {**place, **measured, **settings}


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that not all configs have with the same value."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]


def _described(config: Mapping[str, Any], telling: Sequence[str]) -> str:
    """What tells a run from the others, as overrides."""
    return " ".join(f"{key}={config[key]}" for key in telling if key in config)


def _telling(configs: Sequence[Mapping[str, Any]], differing: Sequence[str]) -> list[str]:
    """Of the keys that differ, those that tell arms apart: not a key that only one option of its group has."""
    material = [key for key in differing if key != "seed" and not is_immaterial(key)]
    return [
        key
        for key in material
        if key.partition(".")[0] not in material or "." not in key or len(_values(configs, key)) > 1
    ]


def _values(configs: Sequence[Mapping[str, Any]], key: str) -> set[str]:
    return {repr(config[key]) for config in configs if key in config}


def is_immaterial(override: str) -> bool:
    """Whether an override, or its dotted key alone, does not change what is computed."""
    key = override.lstrip("+").partition("=")[0]
    return any(key == name or key.startswith(f"{name}.") for name in IMMATERIAL)


def _below(directory: Path) -> list[RunRecords]:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    found = sorted((path.parent for path in directory.rglob(FILE)), key=_natural)
    runs = [_read(path) for path in found]
    if not any(run.history for run in runs):
        raise UserError(f"{directory}: holds no run, it has no epoch in a {FILE} in it or below it")
    return runs


def _natural(path: Path) -> list[str | int]:
    """Texts and numbers in turns, so that 2 comes before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def _read(run_dir: Path) -> RunRecords:
    experiment, arm = _place(run_dir.resolve())
    finished = (run_dir / LEFT_AT_THE_END).exists()
    config = _config(run_dir / CONFIG)
    if experiment and config.get("seed") is None and (seed := run_dir.resolve().parent.name).isdecimal():
        config["seed"] = int(seed)
    return RunRecords(str(run_dir), experiment, arm, finished, config, read_records(run_dir))


def _place(run_dir: Path) -> tuple[str, str]:
    """The experiment and the arm of a run in <experiment>/<seed>/<arm>/; "" if there is none."""
    above = run_dir.parent.parent
    return (above.name, run_dir.name) if (above / DECLARATION).exists() else ("", "")


def _config(path: Path) -> dict[str, Any]:
    """A run's config by dotted keys; values that refer to others or to the environment stay as they were typed."""
    if not path.exists():
        return {}
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, ValueError, YAMLError, RecursionError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: damaged, it is no config ({first_line(error)})") from error
    if wrong := mismatch(content, dict[str, Any], "it"):
        raise UserError(f"{path}: damaged, {wrong}")
    if wrong := mismatch(content.get("seed"), int | None, "seed"):
        raise UserError(f"{path}: damaged, {wrong}")
    return _named_by_group(dict(_flat(content)))


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _named_by_group(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in which the option of a group, `prune.name` or one's own `prune._target_`, is called `prune`."""
    return {re.sub(r"^(\w+)\.(name|_target_)$", r"\1", key): value for key, value in config.items()}


def _stored(uri: str, experiment: str, study: str | None) -> list[RunRecords]:
    from morphtrain.tracking import history

    runs = []
    for run in history.read(uri, experiment, study):
        place = _place(Path(run.tags["run_dir"])) if "run_dir" in run.tags else ("", "")
        config = _named_by_group({key: _value(text) for key, text in run.params.items()})
        runs.append(RunRecords(run.run_id, *place, run.status == "FINISHED", config, run.history))
    return runs


def _value(text: str) -> bool | int | float | str | None:
    """What MLflow has as text."""
    constants = {"True": True, "False": False, "None": None}
    if text in constants:
        return constants[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
