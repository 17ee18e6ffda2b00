"""Checkpoints: what they hold of a run, and the run or network that comes out of one.

`last.pt` is the newest; `previous.pt` the one before it, for when the newest is damaged. `checkpoint_file.py` says how
they are written and read.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain import compilation, custom, morph, options, schema
from morphtrain.errors import UserError, first_line
from morphtrain.initialise import fresh_weights
from morphtrain.memory_limit import AllocationLimit
from morphtrain.plain_data import mismatch
from morphtrain.preprocessing import Preprocessing, of_data, of_json
from morphtrain.ramp import Ramp
from morphtrain.schema.custom import Custom
from morphtrain.state import PARTS, Run
from morphtrain.trainer import auto, checkpoint_file, longer
from morphtrain.trainer.build import FORMATS, build_model, build_run, in_format, needs_no_values
from morphtrain.trainer.differences import differences, flat

LAST, PREVIOUS = "last.pt", "previous.pt"
FORMAT = "morphtrain checkpoint 6"
WITHOUT_DIGEST = "morphtrain checkpoint 5"  # otherwise the same

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

# The types of what a checkpoint holds (`plain_data.mismatch`): for its network, and for the run.
NETWORK_FACTS: dict[str, Any] = {
    "config": {"seed": int, "memory_format": str, "model": dict[str, Any], "norm": dict[str, Any]},
    "architecture": morph.DESCRIPTION,
    "num_classes": int,
    "in_channels": int,
}
NETWORK = {"facts": str, "model": dict[str, Any]}
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

# The types of the facts in each format that this version reads for a run.
FORMATS_OF_RUNS: dict[str, Any] = {FORMAT: NETWORK_FACTS, WITHOUT_DIGEST: NETWORK_FACTS}

# What rebuilding a network may allocate: each of its tensors at most twice, and norms that are made to be resized.
OWN_SHARE, SPARE_BYTES = 2, 2**26

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


class Checkpoint:
    """A checkpoint in memory: `facts` (plain data) and the tensors of model, optimizer and methods.

    Args:
        path: of the file.
        name: what messages call it, such as `resume=last.pt`; the path by default.
        formats: those that it may have, and the types of the facts in each.

    Raises:
        UserError: saying what is wrong with the file.
    """

    def __init__(self, path: Path, name: str = "", formats: Mapping[str, Any] = FORMATS_OF_RUNS) -> None:
        self.path, self.name = path, name or str(path)
        self.content, digested = checkpoint_file.read(path, self.name)
        self.bytes = path.stat().st_size
        self._check_format(digested, formats)
        self.facts: dict[str, Any] = self._parsed_facts(formats)

    def _check_format(self, digested: bool, formats: Mapping[str, Any]) -> None:
        found = self.content.get("format")
        if found in list(formats) and found != WITHOUT_DIGEST and not digested:
            raise UserError(f"{self.name}: damaged checkpoint (its digest is gone)")
        if found not in list(formats):
            wanted = f"'{FORMAT}', not {found!r}"
            raise UserError(f"{self.name}: not a checkpoint of MorphTrain in the present format ({wanted})")

    def _parsed_facts(self, formats: Mapping[str, Any]) -> Any:
        self._check(mismatch(self.content, NETWORK, "the file"))
        try:
            facts = json.loads(self.content["facts"])
        except (ValueError, RecursionError) as error:
            wrong = f"its facts are no JSON: {first_line(error)}"
            raise UserError(f"{self.name}: not a checkpoint of MorphTrain ({wrong})") from error
        self._check(mismatch(facts, formats[self.content["format"]], "facts"))
        for key in ("chosen", "started_from"):  # older ones have none
            self._check(mismatch(facts.get(key, {}), dict[str, str], f"facts.{key}"))
        return facts

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

    def _check(self, wrong: str) -> None:
        if wrong:
            raise UserError(f"{self.name}: not a checkpoint of MorphTrain ({wrong})")

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

    def take_raw(self) -> None:
        """Let the network have its weights as trained, in the place of their averages (`ema`).

        Raises:
            UserError: if there are no averages.
        """
        if "raw" not in self.content:
            raise UserError(f"{self.name}: holds no averages (ema), and its weights as trained are there without raw")
        self._check(mismatch(self.content, {"raw": dict[str, Any]}, "the file"))
        self.content["model"] = self.content["raw"]

    def preprocessing(self) -> Preprocessing:
        """What the file says about inputs and outputs of its network; older files know little."""
        said = self.facts.get("preprocessing", {"num_classes": self.facts.get("num_classes")})
        try:
            return of_json(said)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    def model(self, make: nn.Module | Callable[..., nn.Module] | None = None) -> nn.Module:
        """The network alone, on the CPU; `make` is or makes the user's own network. See `morphtrain.load`.

        Where that is possible it is made without values, so that nothing is taken but the tensors of this checkpoint.
        """
        facts = self.facts
        given = {"num_classes": facts["num_classes"], "in_channels": facts["in_channels"]}
        memory_format = facts.get("chosen", {}).get("memory_format", facts["config"]["memory_format"])
        try:
            for key, value in given.items():
                schema.check(value >= 1, key, value, "1 or more")
            schema.check_one_of("memory_format", memory_format, tuple(FORMATS))
            config = schema.stored_option("model", _network(facts["config"]["model"]))
            norm = schema.stored_option("norm", facts["config"]["norm"])
            build = self._builder(config, norm, make, given)
            known_norm = norm if isinstance(norm, schema.norm.Norm) else None
            device = "meta" if make is None and needs_no_values(config) else "cpu"
            with torch.random.fork_rng(devices=[]):
                model = build_model(config, build, known_norm, facts["config"]["seed"], device)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error
        return in_format(self.rebuild_alone(model), memory_format)

    def architecture(self, config: schema.Config) -> Callable[[nn.Module], nn.Module]:
        """A function that gives a network of `config` the structure that this one ended with, and new random weights.

        Parameters outside layers, which nothing can reset, get the values of a newly made network; if their length has
        changed, they keep those of this one.

        Raises:
            UserError: if `config` has another model, or another norm with layers that do not fit.
        """
        self.check_network(config.model, "architecture=null")

        def restructure(model: nn.Module) -> nn.Module:
            new = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            try:
                model = self.rebuild(model)  # the indices of gated layers are structure too; the weights are reset
            except UserError as error:
                raise self._of_another_norm(config) or error from error
            for name, parameter in model.named_parameters():
                if name in new and new[name].shape == parameter.shape:
                    parameter.data.copy_(new[name])
            fresh_weights(model)
            return model

        return restructure

    def check_network(self, config: schema.model.Model | schema.model.CustomModel, instead: str) -> None:
        """Raise a `UserError` if `config` describes another network than this one; `instead` is what works with it."""
        now, then = _network(asdict(config)), _network(self.facts["config"]["model"])
        here, there = differences({"model": now}, {"model": then})
        if here or there:
            raise UserError(f"{here}: {self.name} was written with {there}; take the same model, or {instead}")

    def _of_another_norm(self, config: schema.Config) -> UserError | None:
        """What is wrong if the norms of `config` are others than those of this run, and so the structure is."""
        here, there = differences({"norm": asdict(config)["norm"]}, {"norm": self.facts["config"]["norm"]})
        if not here:
            return None
        return UserError(f"{here}: {self.name} was written with {there}; take the same norm, or architecture=null")

    def _builder(
        self, config: Any, norm: Any, make: nn.Module | Callable[..., nn.Module] | None, given: dict[str, Any]
    ) -> Callable[[], nn.Module]:
        """A function that makes the network again; it calls nothing merely because this file names it."""
        own = isinstance(config, Custom)
        if isinstance(norm, Custom) and make is None:
            hint = "pass model=, a function that makes the network and applies it"
            raise UserError(f"its norm is {norm.name}; a file does not decide what is called; {hint}")
        if make is not None and not own and not isinstance(norm, Custom):
            passed = getattr(make, "__name__", type(make).__name__)
            raise UserError(f"model={passed}: the file holds the model {config.name}, which needs no model=")
        if not own and make is None:
            return functools.partial(options.build, "model", config, **given)
        if isinstance(make, nn.Module):
            return lambda: make
        wanted = config if own else Custom(config.name, schema.keywords(config))
        maker = make if make is not None else custom.of_checkpoint(config._target_)

        def build() -> nn.Module:
            model: nn.Module = custom.construct("model", maker, wanted, given)
            options.check_kind("model", "model", wanted, model)
            return model

        return build

    def rebuild_alone(self, model: nn.Module) -> nn.Module:
        """Like `rebuild`, but with tensors in the number formats of this file, not in those of `model`."""
        for name, tensor in model.state_dict(keep_vars=True).items():
            kept = self.content["model"].get(name)
            if isinstance(kept, torch.Tensor) and kept.is_floating_point() and tensor.is_floating_point():
                tensor.data = tensor.data.to(kept.dtype)
        return self.rebuild(model)

    def rebuild(self, model: nn.Module, strict: bool = True) -> nn.Module:
        """Restore structure and values in a dense `model`; later traces read the indices of gates from these."""

        def refuse(needed: str) -> NoReturn:
            raise UserError(f"{self.name}: damaged, or not a checkpoint (it describes tensors that it does not hold)")

        device = "meta" if _without_values(model) else "cpu"
        try:
            with AllocationLimit(OWN_SHARE * self.bytes + SPARE_BYTES, refuse), torch.device(device):
                model = morph.rebuild(model, self.facts["architecture"])
        except morph.MorphError as error:
            raise self._unlike(error) from error
        self._load_values(model, strict)
        return model

    def _load_values(self, model: nn.Module, strict: bool, raw: bool = False) -> None:
        """Load parameters and buffers; if not `strict`, those with names that the model has.

        Args:
            raw: those as trained, in the place of their averages (`ema`).
        """
        values = self.content["raw" if raw else "model"]
        try:
            model.load_state_dict(values, strict, assign=_without_values(model))
        except RuntimeError as error:  # other names or shapes
            raise self._unlike(error) from error

    def _unlike(self, error: Exception) -> UserError:
        name = self.facts["config"]["model"].get("_target_", "the model") if "config" in self.facts else "the model"
        reason = " ".join(str(error).split())
        unknown = "Unexpected key(s)" in reason and "parametrizations." in reason
        if unknown and any("parametrizations." in key for key in self.content["model"]):
            computed = "it holds weights that are computed, as by weight norm"
            reason = f"{computed}; pass the network that computes them, or go on with the run whose method does"
        return UserError(f"{self.name}: {name} is not the network it was written with ({reason})")

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


def _network(model: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model, without what the network started from, which older checkpoints do not say."""
    return {**model, "weights": None}


def _ramp(facts: Mapping[str, float]) -> Ramp:
    return Ramp(*(facts[name] for name in RAMP))


def _without_values(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


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
