"""The network that a file holds: a checkpoint of a run, or a file of `morphtrain.save`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from morphtrain import custom, morph, options, schema
from morphtrain.errors import UserError, first_line
from morphtrain.initialise import fresh_weights
from morphtrain.memory_limit import AllocationLimit
from morphtrain.plain_data import mismatch
from morphtrain.preprocessing import Preprocessing, of_json
from morphtrain.schema.custom import Custom
from morphtrain.trainer import checkpoint_file
from morphtrain.trainer.build import FORMATS, build_model, in_format, needs_no_values
from morphtrain.trainer.differences import differences

FORMAT = "morphtrain checkpoint 6"
WITHOUT_DIGEST = "morphtrain checkpoint 5"  # otherwise the same

# The types of what a file holds (`plain_data.mismatch`).
NETWORK_FACTS: dict[str, Any] = {
    "config": {"seed": int, "memory_format": str, "model": dict[str, Any], "norm": dict[str, Any]},
    "architecture": morph.DESCRIPTION,
    "num_classes": int,
    "in_channels": int,
}
NETWORK = {"facts": str, "model": dict[str, Any]}
# The types of the facts in each format that this version reads for a run.
FORMATS_OF_RUNS: dict[str, Any] = {FORMAT: NETWORK_FACTS, WITHOUT_DIGEST: NETWORK_FACTS}

# What rebuilding a network may allocate: each of its tensors at most twice, and norms that are made to be resized.
OWN_SHARE, SPARE_BYTES = 2, 2**26


class StoredNetwork:
    """A file of MorphTrain's in memory: `facts`, which are plain data, and in `content` also its tensors.

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

    def _check(self, wrong: str) -> None:
        if wrong:
            raise UserError(f"{self.name}: not a checkpoint of MorphTrain ({wrong})")

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


def _network(model: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model, without what the network started from, which older checkpoints do not say."""
    return {**model, "weights": None}


def _without_values(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())
