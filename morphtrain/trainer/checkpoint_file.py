"""The file of a checkpoint: written with a digest of everything, and read without trusting anything.

It is the zip archive of `torch.save`, and its comment ends in the SHA-256 of all bytes before. So a single wrong bit is
found before anything is parsed, and `torch.load(path, weights_only=True)` reads the file nevertheless.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from morphtrain.errors import UserError, first_line
from morphtrain.files import write_atomically

ARCHIVE = b"PK\x03\x04"  # what a zip archive begins with
MARK = b"MorphTrain SHA-256 "  # the archive's comment: this, and the digest in hexadecimal
DIGITS = hashlib.sha256().digest_size * 2

# What the pickle in the archive may name: tensors and their storages, and nothing that allocates because it says so.
NAMES = re.compile(
    r"collections OrderedDict|torch Size|torch \w+Storage|torch\.storage UntypedStorage"
    r"|torch (uint|b?float)\w+|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)"
)
PLAIN = (str, int, float, bool, NoneType)
TENSORS = (torch.Tensor, torch.nn.Parameter)
CONTAINERS = (dict, OrderedDict, list, tuple, torch.Size)


def write(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        content: tensors, numbers, text, and lists and dicts of these.
        previous: where the file goes that is there already; None: it is replaced.

    Raises:
        UserError: naming a key of `content`, for what no file gives back.
        OSError: if the disk is full or read-only. In either case the files are unchanged.
    """
    for name, state in content.items():
        _check_plain(name, state)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    for name, state in content.items():
        _check_plain(name, state, most_bytes=buffer.tell())
    buffer.seek(-2, io.SEEK_END)  # the last field of a zip archive: the length of its comment
    buffer.write((len(MARK) + DIGITS).to_bytes(2, "little") + MARK)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.write(digest.encode())
    write_atomically(path, buffer.getbuffer(), previous=previous)


def read(path: Path, name: str) -> tuple[dict[str, Any], bool]:
    """The content of a checkpoint, and whether it had a digest, which those of older versions have not.

    Nothing in the file is executed, and the memory it can take is bounded by its size.

    Args:
        name: of the file in messages.

    Raises:
        UserError: for a file that is missing, damaged or unreadable, or that `write` cannot have written.
    """
    if not path.is_file():
        raise UserError(f"{name}: no such checkpoint")
    try:
        with path.open("rb") as file:
            begins = file.read(len(ARCHIVE))
            stored = begins + file.read() if begins == ARCHIVE else begins  # whatever else it is, it may be huge
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error
    digested = stored[:-DIGITS].endswith(MARK)
    if digested and hashlib.sha256(stored[:-DIGITS]).hexdigest().encode() != stored[-DIGITS:]:
        raise UserError(f"{name}: damaged checkpoint (its content does not have the digest in it)")
    try:
        _check_archive(name, stored, check_crc=not digested)
        content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{name}: not a checkpoint of MorphTrain (it holds more than tensors and text)") from error
    except Exception as error:  # torch and pickle raise nearly everything for bytes that make no sense
        raise UserError(f"{name}: damaged, or not a checkpoint ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{name}: not a checkpoint of MorphTrain (it holds a {type(content).__name__})")
    _check_plain(name, content, most_bytes=len(stored))
    return content, digested


def _check_archive(name: str, stored: bytes, check_crc: bool) -> None:
    """Raise for an archive that `torch.save` does not write: compressed, larger than the file, or with other names."""
    if not stored.startswith(ARCHIVE):
        raise UserError(f"{name}: damaged, or not a checkpoint (not a zip archive)")
    with zipfile.ZipFile(io.BytesIO(stored)) as archive:
        members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > len(stored):
            raise UserError(f"{name}: not a checkpoint of MorphTrain (unpacked, it would be larger than the file)")
        damaged = archive.testzip() if check_crc else None
        if damaged is not None:
            raise UserError(f"{name}: damaged checkpoint ({damaged} fails its checksum)")
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{name}: not a checkpoint of MorphTrain (no file of torch.save)")
        for operation, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not NAMES.fullmatch(str(argument)):
                raise UserError(f"{name}: not a checkpoint of MorphTrain (it holds more than tensors and text)")


def _check_plain(name: str, state: Any, most_bytes: float = math.inf) -> None:
    """Raise a `UserError`, naming `name`, for a state that no file gives back, or with a tensor above `most_bytes`.

    Types count exactly: numpy's float64 is a float, a defaultdict a dict, and neither is loaded again.
    """
    seen: set[int] = set()  # what is held several times is looked at once

    def check(part: str, value: Any) -> None:
        if id(value) in seen or type(value) in PLAIN:
            return
        seen.add(id(value))
        kind = type(value)
        if kind in TENSORS:
            _check_tensor(part, value, most_bytes)
        elif kind not in CONTAINERS:
            wanted = "tensors, numbers, text, lists and dicts work"
            raise UserError(f"{part}: its state_dict() holds a {kind.__name__}; {wanted}")
        elif isinstance(value, dict):
            for key, inner in value.items():
                check(f"{part}, a key", key)
                check(f"{part}.{key}" if part in ("methods", "parts") else part, inner)
        else:
            for inner in value:
                check(part, inner)

    try:
        check(name, state)
    except RecursionError as error:
        raise UserError(f"{name}: has lists or dicts nested too deeply") from error


def _check_tensor(name: str, tensor: torch.Tensor, most_bytes: float) -> None:
    """Raise a `UserError` for a tensor of a kind that is not stored, or one that is larger than the file it is in."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or vars(tensor):
        raise UserError(f"{name}: its state_dict() holds a tensor that is sparse, quantized, empty or has attributes")
    if tensor.numel() * tensor.element_size() > most_bytes:
        raise UserError(f"{name}: holds a tensor {tuple(tensor.shape)} that repeats a few values; clone() stores all")
