"""Measured times of layers, kept from one run to the next: a file for each machine, format and batch size."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morphtrain.files import write_atomically
from morphtrain.plain_data import mismatch

CONTENT: dict[str, Any] = {"facts": dict[str, str], "seconds": dict[str, dict[str, float]]}

Table = dict[str, dict[str, float]]  # kind of layer -> widths, as "64x32" -> seconds

log = logging.getLogger(__name__)


def directory() -> Path:
    """Where the files are: `morphtrain/latency` in the user's cache, as the XDG base directory specification says.

    Raises:
        FileNotFoundError: for a user without a home.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"  # it says to ignore relative ones
    except RuntimeError as error:
        raise FileNotFoundError("there is neither a home directory nor XDG_CACHE_HOME") from error
    return root / "morphtrain" / "latency"


def path_of(facts: Mapping[str, str]) -> Path:
    """The file of what was measured under these circumstances."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return directory() / f"{digest[:16]}.json"


def read(facts: Mapping[str, str]) -> Table:
    """What is known already; nothing of a file that is missing, damaged, or of other circumstances."""
    try:
        path = path_of(facts)
        content = json.loads(path.read_bytes())
        wrong = _mistake(content, facts)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # not to be read; no JSON, no UTF-8
        wrong = str(error)
    if wrong:
        log.info("%s: not used, so layers are measured again (%s)", path, wrong)
        return {}
    table: Table = content["seconds"]
    return table


def add(facts: Mapping[str, str], new: Mapping[str, Mapping[str, float]]) -> None:
    """Keep what was measured, beside what the file has; where that cannot be, it is said and nothing is lost but time.

    Of two processes that write at once the last one wins: what the other had measured is measured again when needed.
    """
    table = read(facts)
    for kind, times in new.items():
        table[kind] = {**table.get(kind, {}), **times}
    try:
        path = path_of(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"facts": dict(facts), "seconds": table}, indent=1).encode())
    except OSError as error:
        log.info("the times of layers are not kept for the next run (%s)", error)


def _mistake(content: Any, facts: Mapping[str, str]) -> str:
    """Why a file cannot be used; "" if it can."""
    wrong = mismatch(content, CONTENT, "the file")
    if wrong:
        return wrong
    if content["facts"] != facts:
        return "it is of another machine or run"
    times = [seconds for found in content["seconds"].values() for seconds in found.values()]
    return "" if all(math.isfinite(s) and s > 0 for s in times) else "it has a time that is not above 0"
