"""Checkpoints: what they hold of a run, and the run that comes out of one.

`last.pt` is the newest; `previous.pt` the one before it, for when the newest is damaged. `checkpoint_file.py` says how
they are written and read, `stored_network.py` how the network comes out of one.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from morphtrain import compilation, morph, schema
from morphtrain.errors import UserError, first_line
from morphtrain.plain_data import mismatch
from morphtrain.preprocessing import of_data
from morphtrain.ramp import Ramp
from morphtrain.schema.custom import Custom
from morphtrain.state import PARTS, Run
from morphtrain.trainer import auto, checkpoint_file, longer
from morphtrain.trainer.build import build_run
from morphtrain.trainer.differences import differences, flat
from morphtrain.trainer.stored_network import FORMAT, StoredNetwork

LAST, PREVIOUS = "last.pt", "previous.pt"

# Keys added later, with the values that hold for older checkpoints.
ADDED_KEYS = {
    "loss.name": "cross_entropy",
    "methods": [],
    "prune.lasso_ratio_of": "loss",
    "data.test_share": 0,
    "data.val_share": 0,
    "grow.new_lr_factor": 1.0,
    "grow.new_lr_epochs": 5.0,
    "data.progressive": 1.0,
    "data.progressive_until": 0.75,
    "data.infobatch": 0.0,
    "data.infobatch_until": 0.875,
    "compile": "none",
    "optimizer.fused": False,
    "data.order": "shuffled",
    "gradient.name": "none",
    "prune.stable": None,
    "model.weights": None,
    "loss.label_smoothing": 0.0,
    "data.mixup": 0.0,
    "data.cutmix": 0.0,
    "data.transforms": [],
    "ema": None,
}
# Fields of a run that a checkpoint holds as plain data.
RUN_STATE = ("epoch", "progress", "batch_size", "micro_batch", "initial", "history", "changes", "lr_factor", "stopped")
RAMPS = ("lr_scale", "rewarmed")

# The types of what a checkpoint holds of the run (`plain_data.mismatch`).
RAMP = {"start": float, "end": float, "since": float, "epochs": float}
RUN_FACTS: dict[str, Any] = {
    "epoch": int,
    "progress": float,
    "batch_size": int,
    "micro_batch": int | None,
    "initial": dict[str, int],
    "history": list[dict[str, float]],
    "changes": list[dict[str, Any]],
    "lr_factor": float,
    "stopped": bool,
    **dict.fromkeys(RAMPS, RAMP),
    "tracking_id": str | None,
}
CHANGE = {"epoch": int, "event": str, "widths": dict[str, int]}
RUN = dict.fromkeys(("optimizer", "precision", "methods", "parts"), dict[str, Any])
AVERAGED = {"raw": dict[str, Any], "averages": {"since": float, "values": dict[str, torch.Tensor]}}  # with `ema`

log = logging.getLogger(__name__)


def save(run: Run, directory: Path, tracking_id: str | None) -> None:
    """Write `run` to `directory`/last.pt; the old last.pt becomes previous.pt.

    Raises:
        OSError: if the disk is full or read-only; both files are unchanged then.
    """
    checkpoint_file.write(directory / LAST, _state(run, tracking_id), previous=directory / PREVIOUS)


def _state(run: Run, tracking_id: str | None) -> dict[str, Any]:
    facts = {
        "config": asdict(run.config),
        "architecture": morph.describe(run.model),
        "num_classes": run.data.num_classes,
        "in_channels": run.data.input_shape[0],
        "preprocessing": asdict(of_data(run.data)),
        **{key: getattr(run, key) for key in RUN_STATE},
        **{key: asdict(getattr(run, key)) for key in RAMPS},
        "growths": [asdict(ramp) for ramp in run.growths],
        "chosen": run.chosen,
        "started_from": run.started_from,
        "cycles": run.cycles,
        "compilation": None if run.compilation is None else run.compilation.state_dict(),
        "tracking_id": tracking_id,
    }
    states = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "precision": run.precision.state_dict(),
        "methods": {name: method.state_dict() for name, method in run.methods.items()},
        "parts": {name: part.state_dict() for name, part in _stateful(run).items()},
        "additions": _additions(run),
    }
    return {"format": FORMAT, "facts": json.dumps(facts), **states, **_averaged(run)}


def _additions(run: Run) -> dict[str, torch.Tensor]:
    """By the names of parameters, which growth has added each of their entries; of those with such entries."""
    numbers = morph.additions_of(run.optimizer).numbers
    return {name: numbers[parameter] for name, parameter in run.model.named_parameters() if parameter in numbers}


def _averaged(run: Run) -> dict[str, Any]:
    """With `ema`: `model` is the averaged network, `raw` the one as trained; and what the averages go on from.

    In 32 bits the averages are the tensors of the averaged network, and are stored once.
    """
    if run.config.ema is None:
        return {}
    raw, averages = run.model.state_dict(), run.averages
    with averages.in_place(run.model.parameters()):
        network = run.model.state_dict()
    network.update({name: value for name, value in averages.statistics.items() if name in network})
    named = run.model.named_parameters()
    values = {name: averages.values[parameter] for name, parameter in named if parameter in averages.values}
    return {"model": network, "raw": raw, "averages": {"since": averages.since, "values": values}}


def _stateful(run: Run) -> dict[str, Any]:
    """The parts that have state: perhaps the user's own, and the scores of images."""
    parts = {name: getattr(run, name) for name in PARTS}
    return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


class Checkpoint(StoredNetwork):
    """The checkpoint of a run in memory: also the tensors of its optimizer and methods."""

    def check_run(self) -> None:
        """Raise a `UserError` if this is not the checkpoint of a run, or of one that is not of the types it must be."""
        self._check(mismatch(self.content, RUN, "the file"))
        self._check(mismatch(self.facts, RUN_FACTS, "facts"))
        for change in self.facts["changes"]:
            self._check(mismatch(change, CHANGE, "a change"))
            self._check(mismatch(change.get("renamed", {}), dict[str, str], "a change's renamed"))
        self._check(mismatch(self._growths(), list[dict[str, float]], "facts.growths"))
        self._check(mismatch(self.facts.get("cycles", []), list[int], "facts.cycles"))
        self._check(mismatch(self.facts["config"], {"epochs": int}, "facts.config"))
        for ramp in self._growths():
            self._check(mismatch(ramp, RAMP, "a growth"))
        self._check(mismatch(self._additions(), dict[str, torch.Tensor], "additions"))
        if self.facts["config"].get("ema") is not None:
            self._check(mismatch(self.content, AVERAGED, "the file"))

    def restore(self, config: schema.Config, device: torch.device | None = None) -> Run:
        """The run as it was after its last full epoch; raises `UserError` if `config` describes another run.

        `device` is as in `build_run`.
        """
        self.check_run()
        self._check_config(config)
        run = build_run(config, morph=functools.partial(self.rebuild, strict=False), device=device)
        self._settle_auto(run)
        run.cycles = self._cycles(config)
        if run.cycles:
            run.schedule = longer.schedule(config, run.cycles)
        self._check_types(run)
        raw = config.ema is not None
        self._load_values(run.model, strict=True, raw=raw)  # again: a method may have wrapped it in `after_build`
        self._load_state("optimizer", run.optimizer, self.content["optimizer"])
        self._keep_types(run.optimizer)
        self._check_moments(run)
        self._load_state("precision", run.precision, self.content["precision"])
        for name, method in run.methods.items():
            if name in self.content["methods"]:
                self._load_state(name, method, self.content["methods"][name])
        for name, part in _stateful(run).items():
            self._load_state(name, part, self.content["parts"].get(name))
        for key in RUN_STATE:
            setattr(run, key, self.facts[key])
        for key in RAMPS:
            setattr(run, key, _ramp(self.facts[key]))
        run.growths = [_ramp(facts) for facts in self._growths()]
        run.started_from = self.facts.get("started_from", {})
        self._load_additions(run)
        self._load_averages(run)
        if run.compilation is not None:
            self._check(mismatch(self.facts.get("compilation"), compilation.TYPES, "facts.compilation"))
            run.compilation.load_state_dict(self.facts["compilation"])
        return run

    def _cycles(self, config: schema.Config) -> list[int]:
        """The epochs after which the schedule begins again in the run that goes on; older checkpoints have none."""
        before, stored = self.facts.get("cycles", []), self.facts["config"]
        return (
            longer.cycles(config, stored, before, self.facts["epoch"]) if longer.is_longer(config, stored) else before
        )

    def _growths(self) -> Any:
        """Those with a learning rate of their own; older checkpoints have none, and no additions."""
        return self.facts.get("growths", [])

    def _additions(self) -> Any:
        return self.content.get("additions", {})

    def _load_additions(self, run: Run) -> None:
        parameters = dict(run.model.named_parameters())
        for name, numbers in self._additions().items():
            parameter = parameters.get(name)
            if parameter is None or numbers.shape != parameter.shape:
                raise UserError(f"{self.name}: its additions do not fit the parameter {name}")
            morph.additions_of(run.optimizer).numbers[parameter] = numbers.to(parameter.device)

    def _load_averages(self, run: Run) -> None:
        if run.config.ema is None:
            return
        stored = self.content["averages"]
        run.averages.begin(stored["since"])
        if not stored["values"]:  # no step was taken
            return
        for name, parameter in run.model.named_parameters():
            if not parameter.is_floating_point():
                continue
            value, kind = stored["values"].get(name), torch.promote_types(parameter.dtype, torch.float32)
            if value is None or value.shape != parameter.shape or value.dtype is not kind:
                raise UserError(f"{self.name}: its averages do not fit the parameter {name}")
            run.averages.values[parameter] = value.to(parameter.device, copy=True)

    def _settle_auto(self, run: Run) -> None:
        """Give the run what was chosen where its config says `auto`."""
        try:
            auto.adopt(run, self.facts.get("chosen", {}))
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    def _load_state(self, name: str, part: Any, state: Any) -> None:
        try:
            part.load_state_dict(state)
        except Exception as error:  # each part says in its own way that it cannot take a state
            wanted = f"{type(part).__name__} ({type(error).__name__}: {first_line(error)})"
            raise UserError(f"{self.name}: its state of {name} is not one of {wanted}") from error

    def _check_types(self, run: Run) -> None:
        """Raise a `UserError` if the run would go on in another number format, which devices choose with `auto`."""
        for name, tensor in run.model.state_dict().items():
            stored = self.content["model"].get(name)
            if isinstance(stored, torch.Tensor) and stored.is_floating_point() and stored.dtype != tensor.dtype:
                here, there = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, stored.dtype))
                precision = f"precision={run.config.precision.name} on {run.device.type}"
                hint = "go on on such a device as it was written on, or start again with resume=never"
                raise UserError(f"{self.name}: its {name} is {there}, and {precision} makes it {here}; {hint}")

    def _keep_types(self, optimizer: Optimizer) -> None:
        """Give the optimizer's state the types of the file; loading has cast it to those of the parameters.

        They differ if weights of 16 bits have a momentum of 32. An optimizer that loads in its own way keeps that.
        """
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            return
        state = self.content["optimizer"]
        numbers = itertools.chain.from_iterable(group["params"] for group in state["param_groups"])
        parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, loaded in optimizer.state.get(parameter, {}).items():
                stored = state["state"][number][key]
                if isinstance(stored, torch.Tensor) and key != "step" and stored.dtype != loaded.dtype:
                    optimizer.state[parameter][key] = stored.to(loaded.device, copy=True)

    def _check_moments(self, run: Run) -> None:
        """Raise a `UserError` if one of our optimizers would find a momentum of another shape in its next step."""
        for parameter, state in run.optimizer.state.items():
            for key, value in state.items():
                moment = isinstance(value, torch.Tensor) and value.dim() > 0
                if moment and value.shape != parameter.shape and not isinstance(run.config.optimizer, Custom):
                    shapes = f"{tuple(value.shape)} for a parameter {tuple(parameter.shape)}"
                    raise UserError(f"{self.name}: its state of optimizer has {key} {shapes}")

    def _check_config(self, config: schema.Config) -> None:
        now, stored = asdict(config), self.facts["config"]
        if longer.is_longer(config, stored):
            stored = {**stored, "epochs": config.epochs}
        known = {*flat(now), *(key for key in ADDED_KEYS if key.split(".")[0] not in self.facts["config"])}
        added = {key: value for key, value in ADDED_KEYS.items() if key in known}
        here, there = differences(now, stored, added)
        if here or there:
            more = f"; {longer.HINT}" if here.startswith("epochs=") and config.epochs > stored["epochs"] else ""
            raise UserError(
                f"{here}: {self.name} was written with {there}; resume with the same, or start again in another "
                f"hydra.run.dir with resume=never{more}"
            )


def _ramp(facts: Mapping[str, float]) -> Ramp:
    return Ramp(*(facts[name] for name in RAMP))


def find(directory: Path) -> Checkpoint | None:
    """The newest sound checkpoint in `directory`, None if there is none at all.

    A broken one is reported and the one before it is used; raises `UserError` if that is broken too.
    """
    present = [directory / name for name in (LAST, PREVIOUS) if (directory / name).exists()]
    for path in present:
        try:
            found = Checkpoint(path, f"resume=auto: {path}")
            found.check_run()
            return found
        except UserError as error:
            if path == present[-1]:
                raise
            log.warning("%s; going on from %s", error, present[-1].name)
    return None
