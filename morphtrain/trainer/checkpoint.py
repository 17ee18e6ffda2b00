"""Checkpoints: atomic, plain tensors and JSON, and enough of them to survive a broken one.

`last.pt` is the newest; `previous.pt` the one before it. A file is written under another name and
then renamed, so neither name ever stands for a half-written file; every record in it carries a CRC-32, which is checked
before it is used.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn

from morphtrain import custom, morph, options, schema
from morphtrain.errors import UserError
from morphtrain.files import write_atomically
from morphtrain.initialise import fresh_weights
from morphtrain.preprocessing import Preprocessing, of_data, of_json
from morphtrain.ramp import Ramp
from morphtrain.schema.custom import Custom
from morphtrain.state import Run
from morphtrain.trainer.build import build_model, build_run, in_format

LAST, PREVIOUS = "last.pt", "previous.pt"
FORMAT = "morphtrain checkpoint 5"

# Keys that may differ between a checkpoint and the run that goes on from it: they do not change what is computed.
FREE_KEYS = (
    "resume",
    "device",
    "objective",
    "trial",
    "tracking",
    "timing",
    "data.root",
    "data.download",
    "data.num_workers",
)
# Keys added later, with the values that hold for older checkpoints.
ADDED_KEYS = {"loss.name": "cross_entropy", "methods": []}
# Parts of a run that may have state if they are the user's own.
PARTS = ("data", "criterion", "schedule")
# Fields of a run that a checkpoint holds as plain data.
RUN_STATE = ("epoch", "progress", "batch_size", "micro_batch", "initial", "history", "changes", "lr_factor", "stopped")
RAMPS = ("lr_scale", "rewarmed")

PLAIN = (str, int, float, bool, NoneType)
CONTAINERS = (dict, OrderedDict, list, tuple, torch.Size)

log = logging.getLogger(__name__)


def save(run: Run, directory: Path, tracking_id: str | None) -> None:
    """Write `run` to `directory`/last.pt; the old last.pt becomes previous.pt.

    Raises:
        OSError: if the disk is full or read-only; both files are unchanged then.
    """
    write(_state(run, tracking_id), directory / LAST, previous=directory / PREVIOUS)


def write(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write `content`, whole or not at all; the file that is there already becomes `previous`, if given.

    Raises:
        UserError: for a state that no file gives back.
        OSError: if the disk is full or read-only; the files are unchanged then.
    """
    for name, state in content.items():
        _check_plain(name, state)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer(), previous=previous)


def _state(run: Run, tracking_id: str | None) -> dict[str, Any]:
    facts = {
        "config": asdict(run.config),
        "architecture": morph.describe(run.model),
        "num_classes": run.data.num_classes,
        "in_channels": run.data.input_shape[0],
        "preprocessing": asdict(of_data(run.data)),
        **{key: getattr(run, key) for key in RUN_STATE},
        **{key: asdict(getattr(run, key)) for key in RAMPS},
        "tracking_id": tracking_id,
    }
    states = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "precision": run.precision.state_dict(),
        "methods": {name: method.state_dict() for name, method in run.methods.items()},
        "parts": {name: part.state_dict() for name, part in _stateful(run).items()},
    }
    return {"format": FORMAT, "facts": json.dumps(facts), **states}


def _stateful(run: Run) -> dict[str, Any]:
    """The user's own parts that have state."""
    parts = {name: getattr(run, name) for name in PARTS}
    return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


def _check_plain(name: str, state: Any) -> None:
    """Raise a `UserError` for a state that no file gives back: of types that `weights_only` does not load.

    Types count exactly: numpy's float64 is a float, a defaultdict a dict, and neither is loaded again.
    """
    if isinstance(state, torch.Tensor) or type(state) in PLAIN:
        return
    if type(state) not in CONTAINERS:
        kind = type(state).__name__
        raise UserError(f"{name}: its state_dict() holds a {kind}; tensors, numbers, text, lists and dicts work")
    if isinstance(state, dict):
        for key, value in state.items():
            _check_plain(f"{name}, a key", key)
            _check_plain(f"{name}.{key}" if name in ("methods", "parts") else name, value)
    else:
        for value in state:
            _check_plain(name, value)


class Checkpoint:
    """A checkpoint in memory: `facts` (plain data) and the tensors of model, optimizer and methods."""

    def __init__(self, path: Path, formats: Sequence[str] = (FORMAT,)) -> None:
        """Read and verify a file of one of these formats; raises `UserError` that says what is wrong with it."""
        self.path = path
        self.content = _read(path, formats)
        self.facts: dict[str, Any] = json.loads(self.content["facts"])

    def restore(self, config: schema.Config, device: torch.device | None = None) -> Run:
        """The run as it was after its last full epoch; raises `UserError` if `config` describes another run.

        `device` is as in `build_run`.
        """
        self._check_config(config)
        run = build_run(config, morph=functools.partial(self.rebuild, strict=False), device=device)
        self._load_values(run.model, strict=True)  # again: a method may have wrapped it in `after_build`
        run.optimizer.load_state_dict(self.content["optimizer"])
        run.precision.load_state_dict(self.content["precision"])
        for name, method in run.methods.items():
            if name in self.content["methods"]:
                method.load_state_dict(self.content["methods"][name])
        for name, part in _stateful(run).items():
            part.load_state_dict(self.content["parts"][name])
        for key in RUN_STATE:
            setattr(run, key, self.facts[key])
        for key in RAMPS:
            setattr(run, key, Ramp(**self.facts[key]))
        return run

    def preprocessing(self) -> Preprocessing:
        """What the file says about inputs and outputs of its network; older files know little."""
        said = self.facts.get("preprocessing", {"num_classes": self.facts.get("num_classes")})
        try:
            return of_json(said)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error

    def model(self, make: nn.Module | Callable[..., nn.Module] | None = None) -> nn.Module:
        """The network alone, on the CPU; `make` is or makes the user's own network. See `morphtrain.load`."""
        facts = self.facts
        try:
            config = schema.stored_option("model", facts["config"]["model"])
            norm = schema.stored_option("norm", facts["config"]["norm"])
        except (TypeError, AttributeError) as error:
            raise UserError(f"{self.path}: not a model of this version of MorphTrain ({error})") from error
        given = {"num_classes": facts["num_classes"], "in_channels": facts["in_channels"]}
        build = self._builder(config, norm, make, given)
        with torch.random.fork_rng(devices=[]):
            model = build_model(build, norm if isinstance(norm, schema.norm.Norm) else None, facts["config"]["seed"])
        return in_format(self.rebuild(model), facts["config"]["memory_format"])

    def architecture(self, config: schema.Config) -> Callable[[nn.Module], nn.Module]:
        """A function that gives a network of `config` the structure that this one ended with, and new random weights.

        Parameters outside layers, which nothing can reset, get the values of a newly made network; if their length has
        changed, they keep those of this one.

        Raises:
            UserError: if `config` has another model.
        """
        then, now = flat(self.facts["config"]["model"]), flat(asdict(config)["model"])
        if then != now:
            key = next(key for key in (*then, *now) if then.get(key) != now.get(key))
            wanted = f"{self.path} was written with model.{key}={then.get(key)}; take the same model"
            raise UserError(f"model.{key}={now.get(key)}: {wanted}, or architecture=null")

        def restructure(model: nn.Module) -> nn.Module:
            new = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            model = self.rebuild(model)  # the indices of gated layers are structure too; the weights are reset
            for name, parameter in model.named_parameters():
                if name in new and new[name].shape == parameter.shape:
                    parameter.data.copy_(new[name])
            fresh_weights(model)
            return model

        return restructure

    def _builder(
        self, config: Any, norm: Any, make: nn.Module | Callable[..., nn.Module] | None, given: dict[str, Any]
    ) -> Callable[[], nn.Module]:
        """A function that makes the network again; it calls nothing merely because this file names it."""
        own = isinstance(config, Custom)
        if isinstance(norm, Custom) and make is None:
            hint = "pass model=, a function that makes the network and applies it"
            raise UserError(f"{self.path}: its norm is {norm.name}; a file does not decide what is called; {hint}")
        if make is not None and not own and not isinstance(norm, Custom):
            passed = getattr(make, "__name__", type(make).__name__)
            raise UserError(f"model={passed}: {self.path} holds the model {config.name}, which needs no model=")
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

    def rebuild(self, model: nn.Module, strict: bool = True) -> nn.Module:
        """Restore structure and values in a dense `model`; later traces read the indices of gates from these."""
        try:
            model = morph.rebuild(model, self.facts["architecture"])
        except (AttributeError, RuntimeError) as error:  # a path that the network does not have
            raise self._unlike(error) from error
        self._load_values(model, strict)
        return model

    def _load_values(self, model: nn.Module, strict: bool) -> None:
        """Load parameters and buffers; if not `strict`, those with names that the model has."""
        try:
            model.load_state_dict(self.content["model"], strict)
        except RuntimeError as error:  # other names or shapes
            raise self._unlike(error) from error

    def _unlike(self, error: Exception) -> UserError:
        name = self.facts["config"]["model"].get("_target_", "the model") if "config" in self.facts else "the model"
        reason = " ".join(str(error).split())
        if any("parametrizations." in key for key in self.content["model"]):
            reason = "a method had its weights computed, and only a run with that method goes on from there"
        return UserError(f"{self.path}: {name} is not the network it was written with ({reason})")

    def _check_config(self, config: schema.Config) -> None:
        stored = self.facts["config"]
        added = {key: value for key, value in ADDED_KEYS.items() if key.partition(".")[0] not in stored}
        then, now = added | flat(stored), flat(asdict(config))
        for key in sorted({*then, *now}):
            free = any(key == k or key.startswith(k + ".") for k in FREE_KEYS)
            if not free and then.get(key) != now.get(key):
                raise UserError(
                    f"{key}={now.get(key)}: {self.path} was written with {key}={then.get(key)}; "
                    "resume with the same value, or start again in another hydra.run.dir with resume=never"
                )


def find(directory: Path) -> Checkpoint | None:
    """The newest sound checkpoint in `directory`, None if there is none at all.

    A broken one is reported and the one before it is used; raises `UserError` if that is broken too.
    """
    present = [directory / name for name in (LAST, PREVIOUS) if (directory / name).exists()]
    for path in present:
        try:
            return Checkpoint(path)
        except UserError as error:
            if path == present[-1]:
                raise
            log.warning("%s; going on from %s", error, present[-1].name)
    return None


def _read(path: Path, formats: Sequence[str]) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path}: damaged checkpoint ({damaged} fails its checksum)")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise UserError(f"{path}: damaged, or not a checkpoint ({error})") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: not a checkpoint of MorphTrain (it holds more than tensors and text)") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found not in formats:
        raise UserError(f"{path}: not a checkpoint of MorphTrain in the present format ('{FORMAT}', not {found!r})")
    return content


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level of dotted keys."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key == "arguments" and "_target_" in config:
            result.update(flat(value, prefix))  # of the user's own part: keys of its group, as the user typed them
        elif isinstance(value, dict):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result
