"""Training that starts from trained weights (config key `model.weights`), and from the structure that comes with them.

They are read once, when a run is new: its checkpoints hold all that follows.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from morphtrain import morph, options, schema
from morphtrain.contracts import Data
from morphtrain.errors import UserError
from morphtrain.initialise import fresh_weights
from morphtrain.memory_limit import AllocationLimit
from morphtrain.plain_data import mismatch
from morphtrain.preprocessing import of_data
from morphtrain.state import derived_seed
from morphtrain.trainer.build import build_model
from morphtrain.trainer.stored_network import OWN_SHARE, SPARE_BYTES
from morphtrain.trainer.trained_file import Trained, digest, read
from morphtrain.trainer.trained_fit import Head, check_computed, load
from morphtrain.trainer.trained_images import differences
from morphtrain.wording import counted

Config = schema.Config | schema.MaxBatch

log = logging.getLogger(__name__)


def find(config: Config) -> Trained:
    """What `model.weights` names: weights that the network's source publishes, or a file.

    Raises:
        UserError: if there are none, or they are of another network of MorphTrain's.
    """
    weights = config.model.weights
    assert weights is not None
    name = f"model.weights={weights}"
    published = options.published_weights(config.model)
    if published is not None:
        file, tensors, images = published
        return Trained(name, {"": tensors}, digest(file), file.stat().st_size, preprocessing=images)
    found = read(name, Path(weights).expanduser())
    if found.checkpoint is not None:
        found.checkpoint.check_network(config.model, "model.weights=null")
    return replace(found, checkpoint=None)  # which has the state of an optimizer, too


def facts(config: Config, trained: Trained) -> dict[str, str]:
    """What a run started from, for its records."""
    return {"weights": str(config.model.weights), "weights_sha256": trained.digest}


def into(
    trained: Trained, model: nn.Module, config: Config, num_classes: int, in_channels: int, seed: int, structure: bool
) -> nn.Module:
    """Give a new network of `config` the structure and the values of trained weights, and return it.

    A last layer for other classes is a new one: as it was made, or drawn again if pruning has left it fewer inputs.

    Args:
        structure: whether to take that of the file, if it has one; False: the network has its structure.

    Raises:
        UserError: naming what does not fit.
    """
    if any(map(is_lazy, model.parameters())):
        return model  # is refused when it is tried
    theirs = trained.preprocessing.input_shape
    if theirs is not None and theirs[0] != in_channels:
        here = f"the data has {in_channels}; data with as many works"
        raise UserError(f"{trained.name}: is of a network for images with {counted(theirs[0], 'channel')}, {here}")
    check_computed(trained.name, model.state_dict(), trained.sets)
    if structure and trained.architecture is not None:
        model = _restructured(trained, model, config, num_classes, in_channels, seed)
    head = load(trained.name, model, trained.sets, num_classes)
    more = _said(head, num_classes)
    log.info("%s: training starts from it (SHA-256 %s...)%s", trained.name, trained.digest[:12], more)
    return model


def _said(head: Head | None, num_classes: int) -> str:
    if head is None:
        return ""
    return f", with a new last layer ({', '.join(head.names)}) for {num_classes} classes instead of {head.classes}"


def _restructured(
    trained: Trained, model: nn.Module, config: Config, num_classes: int, in_channels: int, seed: int
) -> nn.Module:
    """Give a new network the structure of the trained one, except for the number of its classes."""

    def refuse(needed: str) -> NoReturn:
        raise UserError(f"{trained.name}: it describes tensors that it does not hold ({needed})")

    architecture, head = trained.architecture, {}
    assert architecture is not None
    if wrong := mismatch(architecture, morph.DESCRIPTION, "architecture"):
        raise UserError(f"{trained.name}: {wrong}")
    classes = trained.preprocessing.num_classes or num_classes
    held = trained.bytes + sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        if classes != num_classes:
            given = {"num_classes": classes, "in_channels": in_channels}
            before = build_model(config.model, lambda: options.build("model", config.model, **given), config.norm, seed)
            architecture = with_classes_of(model, before, architecture)
            head = _difference(morph.describe(model)["shapes"], morph.describe(before)["shapes"])
        new = {key: tensor.clone() for key, tensor in model.state_dict().items() if key in head}
        with AllocationLimit(OWN_SHARE * held + SPARE_BYTES, refuse):
            model = morph.rebuild(model, architecture)
    except morph.MorphError as error:
        said = " ".join(str(error).split())
        raise UserError(f"{trained.name}: is of another network than model={config.model.name} ({said})") from error
    _start_head(model, new, seed)
    return model


def with_classes_of(model: nn.Module, before: nn.Module, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture of networks like `before`, for as many classes as `model`, which otherwise is the same.

    Raises:
        MorphError: for an architecture of other networks.
    """
    now, then = morph.describe(model), morph.describe(before)
    changed = copy.deepcopy(dict(architecture))
    for key, shape in _difference(now["shapes"], then["shapes"]).items():
        if key in changed["shapes"]:
            if len(changed["shapes"][key]) != len(shape):
                raise morph.MorphError(f"{key} has {len(shape)} dimensions, not {len(changed['shapes'][key])}")
            sizes = zip(changed["shapes"][key], shape, then["shapes"][key], strict=True)
            changed["shapes"][key] = [own if new == old else new for own, new, old in sizes]
    for path, widths in _difference(now["widths"], then["widths"]).items():
        if path in changed["widths"]:
            changed["widths"][path] |= _difference(widths, then["widths"][path])
    return changed


def _difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """What `here` has under keys of both, where that is something else."""
    return {key: value for key, value in here.items() if key in there and there[key] != value}


@torch.no_grad()
def _start_head(model: nn.Module, new: Mapping[str, torch.Tensor], seed: int) -> None:
    """Give a last layer the values it was made with; where its inputs have changed, draw them."""
    own = model.state_dict()
    paths = {key.rpartition(".")[0].partition(".parametrizations.")[0] for key in new}
    if any(own[key].shape != tensor.shape for key, tensor in new.items()):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed(seed, 0))
            for path in paths:
                fresh_weights(model.get_submodule(path))
    else:
        for key, tensor in new.items():
            own[key].copy_(tensor)


def starter(config: schema.Config, trained: Trained) -> Callable[[nn.Module, Data], nn.Module]:
    """What `build_run` does with a new network, and the data it is for."""

    def start(model: nn.Module, data: Data) -> nn.Module:
        structure = config.architecture is None
        model = into(trained, model, config, data.num_classes, data.input_shape[0], config.seed, structure)
        if found := differences(trained.preprocessing, of_data(data)):
            log.info("%s: trained on other images than those of data=%s: %s", trained.name, config.data.name, found)
        return model

    return start
