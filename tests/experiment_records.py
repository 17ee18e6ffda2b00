"""Experiments that have been run, as their directories are left: known effects, known noise, no training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from morphtrain.evidence import experiment as declaration
from morphtrain.evidence.experiment import Arm, Experiment

MACHINE = {"host": "lab", "processor": "a CPU", "threads": "1", "morphtrain_commit": "0123abc", "device": "cpu"}
Metrics = Callable[[str, int, int], Mapping[str, float]]  # of an arm, a seed and an epoch


def declared(analysis: str, arms: Mapping[str, Arm], seeds: Sequence[int], **more: Any) -> Experiment:
    """A declaration with what is usual left out."""
    usual: dict[str, Any] = {
        "name": f"{analysis}_question",
        "size": "small",
        "question": f"Is this the question of {analysis}?",
        "thesis": "3.2.1",
        "response": "calibrated_train_seconds",
        "margin": 0.01,
    }
    return Experiment(**{**usual, **more}, analysis=analysis, arms=arms, seeds=tuple(seeds))


def write_declaration(root: Path, experiment: Experiment) -> Path:
    """The experiment's directory, with its declaration."""
    directory = root / f"{experiment.name}-{experiment.size}"
    directory.mkdir(parents=True)
    (directory / declaration.FILE).write_text(OmegaConf.to_yaml(OmegaConf.create(declaration.as_plain(experiment))))
    return directory


def write(
    root: Path,
    experiment: Experiment,
    metrics: Metrics,
    epochs: int = 4,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    machine: Mapping[str, Any] = MACHINE,
) -> Path:
    """The experiment with all its runs finished; returns its directory.

    Args:
        configs: what the composed config of an arm has beside the seed.
    """
    directory = write_declaration(root, experiment)
    for seed in experiment.seeds:
        for arm in experiment.arms:
            run = directory / str(seed) / arm
            (run / ".hydra").mkdir(parents=True)
            config = {"seed": seed, "epochs": epochs, **(configs or {}).get(arm, {})}
            (run / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
            records = [{"epoch": e, "contended": 0, **metrics(arm, seed, e)} for e in range(1, epochs + 1)]
            (run / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            (run / "environment.json").write_text(json.dumps(dict(machine)))
            (run / "run.png").touch()
    return directory


def cut(directory: Path, seed: int, arm: str, epochs: int) -> None:
    """Leave a run as a kill leaves it after its epoch `epochs`; with 0, as if it had not begun."""
    run = directory / str(seed) / arm
    if not epochs:
        shutil.rmtree(run)
        return
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    (run / "records.jsonl").write_text("".join(lines[:epochs]))
    (run / "run.png").unlink()
