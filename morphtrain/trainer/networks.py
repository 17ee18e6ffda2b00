"""A network alone: from a run's checkpoint, or to a file and back from a loop of one's own.

A file of `save` holds no constructor: whoever loads it passes the network as it was before it was pruned. Only a
network that came out of a run's checkpoint still knows what it was made from, and is written as one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

from torch import nn

from morphtrain import custom, morph, schema
from morphtrain.errors import UserError
from morphtrain.preprocessing import Preprocessing
from morphtrain.schema.custom import Custom
from morphtrain.trainer import checkpoint_file, stored_network
from morphtrain.trainer.build import FORMATS, in_format
from morphtrain.trainer.stored_network import StoredNetwork

FORMAT = "morphtrain network 1"
ORIGIN = "_made_from"  # attribute of a network that `load` gave: the facts of its checkpoint that stay, plain data
FACTS = {"network": str, "architecture": morph.DESCRIPTION, "memory_format": str, "preprocessing": dict[str, Any]}


def save(model: nn.Module, path: Path, preprocessing: Preprocessing | None = None) -> None:
    """See `morphtrain.save`."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model is a {type(model).__name__}; a torch.nn.Module can be saved")
    if not isinstance(preprocessing, (Preprocessing, NoneType)):
        found, wanted = type(preprocessing).__name__, "a morphtrain.preprocessing.Preprocessing, or None, works"
        raise UserError(f"preprocessing is a {found}; {wanted}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.parent}; make it first")
    memory_format = next(name for name, kind in FORMATS.items() if kind is morph.format_of_model(model))
    facts: dict[str, Any] = {"architecture": morph.describe(model)}
    origin: dict[str, Any] | None = getattr(model, ORIGIN, None)
    if origin is None:
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        facts |= {"network": name, "memory_format": memory_format, "preprocessing": asdict(Preprocessing())}
    else:
        facts |= {**origin, "config": {**origin["config"], "memory_format": memory_format}}
    if preprocessing is not None:
        facts["preprocessing"] = asdict(preprocessing)
    kind = FORMAT if origin is None else stored_network.FORMAT
    checkpoint_file.write(path, {"format": kind, "facts": json.dumps(facts), "model": model.state_dict()})


def read(path: Path, name: str = "") -> StoredNetwork:
    """The checkpoint of a run, or a file of `save`; messages call it `name`, by default its path."""
    stored = StoredNetwork(path, name, formats={**stored_network.FORMATS_OF_RUNS, FORMAT: FACTS})
    if stored.content["format"] == FORMAT:
        schema.check_one_of(f"{path}: memory_format", stored.facts["memory_format"], tuple(FORMATS))
    return stored


def load(stored: StoredNetwork, model: nn.Module | Callable[..., nn.Module] | None, raw: bool = False) -> nn.Module:
    """See `morphtrain.load`."""
    if raw:
        stored.take_raw()
    if stored.content["format"] == FORMAT:
        return in_format(stored.rebuild_alone(_dense(stored, model)), stored.facts["memory_format"]).eval()
    network = stored.model(model).eval()
    kept = {key: stored.facts[key] for key in ("num_classes", "in_channels")}
    config = {key: stored.facts["config"][key] for key in stored_network.NETWORK_FACTS["config"]}
    setattr(network, ORIGIN, {**kept, "config": config, "preprocessing": asdict(stored.preprocessing())})
    return network


def _dense(stored: StoredNetwork, model: nn.Module | Callable[..., nn.Module] | None) -> nn.Module:
    name = stored.facts["network"]
    if model is None:
        raise UserError(f"{stored.path}: holds a {name} without what makes it; pass model=, as it was before pruning")
    if isinstance(model, nn.Module):
        return model
    said = stored.preprocessing()
    shape = said.input_shape
    given = {"num_classes": said.num_classes, "in_channels": None if shape is None else shape[0]}
    wanted = Custom(name, {})
    made = custom.construct("model", model, wanted, {key: value for key, value in given.items() if value is not None})
    if not isinstance(made, nn.Module):
        raise UserError(f"model={name}: makes a {type(made).__name__}, not a torch.nn.Module")
    return made
