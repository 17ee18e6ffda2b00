"""Files of trained weights: a state dict of `torch.save`, safetensors, or a checkpoint or export of MorphTrain's.

Nothing in a file is executed (`weights_only=True`).
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from morphtrain.errors import UserError, first_line
from morphtrain.export.state_dict import SUFFIX
from morphtrain.preprocessing import Preprocessing, of_json
from morphtrain.trainer import checkpoint_file, networks
from morphtrain.trainer.stored_network import StoredNetwork

Tensors = Mapping[str, torch.Tensor]

KINDS = "a state_dict of torch.save, a .safetensors file, or a checkpoint or state_dict export of MorphTrain"


@dataclass(frozen=True)
class Trained:
    """What a file holds of a trained network.

    Args:
        name: the config key and its value, for messages.
        sets: tensors by their names in the network, by where in the file they are; nearly always of one place.
        digest: the SHA-256 of the file.
        bytes: its size.
        architecture: what `morph.describe` says of a network whose structure has been changed; None if that is not
            known.
        preprocessing: of the images that it was trained on, as far as it is known.
        checkpoint: of a run that it comes from.
    """

    name: str
    sets: Mapping[str, Tensors]
    digest: str
    bytes: int
    architecture: Mapping[str, Any] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    checkpoint: StoredNetwork | None = None


def read(name: str, path: Path) -> Trained:
    """What the file at `path` holds; `name` is the config key and its value, for messages.

    Raises:
        UserError: for a file that is missing or cannot be read, or that holds no trained network.
    """
    if not path.is_file():
        raise UserError(f"{name}: there is no such file; the path of {KINDS} works")
    try:
        facts: dict[str, Any] = {"digest": digest(path), "bytes": path.stat().st_size}
        if _is_ours(path):
            return _of_checkpoint(name, path, facts)
        if _is_safetensors(path):
            return Trained(name, {"": _safetensors(name, path)}, **facts)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error
    content = _unpickled(name, path)
    if isinstance(content, dict) and str(content.get("format")).startswith("morphtrain "):  # older, so without a mark
        return _of_checkpoint(name, path, facts)
    try:
        sets = dict(_state_dicts(content))
    except RecursionError as error:
        raise UserError(f"{name}: holds dicts within dicts without an end; {KINDS} works") from error
    if not sets:
        raise UserError(f"{name}: holds no state_dict; torch.save(model.state_dict(), path) writes one")
    return Trained(name, sets, **facts, **_beside(name, path))


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()


def _is_ours(path: Path) -> bool:
    """Whether a file ends in the digest that our checkpoints have."""
    length = len(checkpoint_file.MARK) + checkpoint_file.DIGITS
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - length))
        return file.read().startswith(checkpoint_file.MARK)


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON text in 8 bytes, and that text."""
    with path.open("rb") as file:
        begins = file.read(9)
    length = int.from_bytes(begins[:8], "little")
    return path.suffix == ".safetensors" or (begins[8:] == b"{" and length < path.stat().st_size)


def _of_checkpoint(name: str, path: Path, facts: Mapping[str, Any]) -> Trained:
    stored = networks.read(path, name)
    of_run = stored if stored.content["format"] != networks.FORMAT else None
    tensors = {key: value for key, value in stored.content["model"].items() if isinstance(value, torch.Tensor)}
    known = {"architecture": stored.facts["architecture"], "preprocessing": stored.preprocessing()}
    return Trained(name, {"": tensors}, **facts, **known, checkpoint=of_run)


def _safetensors(name: str, path: Path) -> Tensors:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{name}: safetensors files need a package; pip install 'morphtrain[safetensors]'") from error
    try:
        found: Tensors = load_file(path)
    except Exception as error:  # its own kind for a file that makes no sense
        raise UserError(f"{name}: damaged, or not a safetensors file ({first_line(error)})") from error
    return found


def _unpickled(name: str, path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        alone = "save its state_dict alone, torch.save(model.state_dict(), path)"
        raise UserError(f"{name}: holds more than tensors and plain data, which could run code; {alone}") from error
    except Exception as error:  # torch and pickle raise nearly everything for bytes that make no sense
        reason, _, _ = first_line(error).partition(". ")  # what follows it is torch's advice, as to trust the file
        raise UserError(f"{name}: cannot be read ({reason}); {KINDS} works") from error


def _state_dicts(content: Any, place: str = "") -> Iterator[tuple[str, Tensors]]:
    """The dicts of nothing but tensors, by where they are: beside epochs and optimizers, as `state_dict` or `model`."""
    if not isinstance(content, Mapping):
        return
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    if named and len(named) == len(content) and all(isinstance(value, torch.Tensor) for value in named.values()):
        yield place, named
        return
    for key, value in named.items():
        yield from _state_dicts(value, f"{place}.{key}" if place else key)


def _beside(name: str, path: Path) -> dict[str, Any]:
    """What an export as a state dict has written beside it: structure, and what inputs and outputs are."""
    stem = path.name.removesuffix(SUFFIX) if path.name.endswith(SUFFIX) else path.stem
    files = {what: path.with_name(f"{stem}.{what}.json") for what in ("architecture", "preprocessing")}
    if not files["architecture"].is_file():
        return {}
    found = {what: _json(name, file) for what, file in files.items() if file.is_file()}
    if "preprocessing" in found:
        try:
            found["preprocessing"] = of_json(found["preprocessing"])
        except UserError as error:
            raise UserError(f"{name}: {files['preprocessing'].name} beside it: {error}") from error
    return found


def _json(name: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: {path.name} beside it cannot be read ({first_line(error)})") from error
