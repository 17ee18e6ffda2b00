"""Sizes in bytes, read from and written as text such as 11GiB."""

from __future__ import annotations

import math
import re

from morphtrain.errors import UserError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SIZE = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?) *([a-z]*)", re.IGNORECASE)


def byte_count(key: str, value: object) -> float:
    """Bytes from 11GiB, 512MiB, 2.5GB, 8e9 or a number; raises `UserError`, naming `key`, for anything else."""
    match = SIZE.fullmatch(str(value).strip())
    try:
        size = float(match[1]) * UNITS[match[2].upper()] if match else _refuse(key, value)
    except (ValueError, KeyError):  # 1.2.3, 11GiG
        return _refuse(key, value)
    return size if math.isfinite(size) else _refuse(key, value)


def left_of(key: str, size: float, overhead: object) -> float:
    """Bytes left of `size` after subtracting `overhead`, a share (22%, 0.22) or a size.

    Raises:
        UserError: naming `key`, if `overhead` is neither.
    """
    text = str(overhead)
    part = byte_count(key, text.removesuffix("%"))
    share = part / 100 if text.endswith("%") else part
    return size * (1 - share) if share < 1 or text.endswith("%") else size - part


def _refuse(key: str, value: object) -> float:
    raise UserError(f"{key}={value}: must be a size such as 11GiB, 512MiB, 2.5GB or 8e9 (bytes)") from None


def readable(size: float) -> str:
    """`size` bytes as text with four digits and a unit: 1.523 MiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1000 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.4g} {units[0]}"
