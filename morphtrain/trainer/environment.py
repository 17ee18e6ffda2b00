"""The machine and the code of a run: `environment.json` in its directory, and tags of the tracker."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import morphtrain
from morphtrain import world
from morphtrain.files import write_atomically
from morphtrain.schema.files import PACKAGE
from morphtrain.timing.processor import processor

log = logging.getLogger(__name__)

FILE = "environment.json"


def describe(device: torch.device) -> dict[str, str]:
    """What a reader has to know to judge the times, by name.

    `git_commit` is that of the directory the run was started from, `git_clean` whether its tracked files were as
    committed; `morphtrain_commit` that of MorphTrain itself, if it runs from a checkout. What is not known is left out.
    Several processes all call this; it adds how many there are, what sums their gradients, and their hosts.
    """
    facts = {
        "host": platform.node(),
        "device": str(device),
        "processor": processor(device),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "morphtrain": morphtrain.__version__,
        "morphtrain_commit": _git(PACKAGE, "rev-parse", "HEAD") if _is_checkout(PACKAGE) else None,
        "git_commit": _git(Path.cwd(), "rev-parse", "HEAD"),
    }
    changed = _git(Path.cwd(), "status", "--porcelain", "--untracked-files=no")
    if facts["git_commit"] and changed is not None:
        facts["git_clean"] = str(not changed).lower()
    if world.size() > 1:
        hosts = dict.fromkeys(world.gathered(platform.node()))
        backend = "nccl" if device.type == "cuda" else "gloo"
        facts |= {"processes": str(world.size()), "backend": backend, "hosts": " ".join(hosts)}
    return {name: value for name, value in facts.items() if value}


def write(run_dir: Path, facts: Mapping[str, str]) -> None:
    """Write the facts to `run_dir`; those of an earlier part of a run that goes on elsewhere stay, under `before`."""
    path = run_dir / FILE
    found = _read(path)
    before = found.pop("before", [])
    if found and found != facts:
        before = [*before, found]
    content = dict(facts) | ({"before": before} if before else {})
    write_atomically(path, json.dumps(content, indent=1).encode())


def _read(path: Path) -> dict[str, Any]:
    """What is there already; nothing, with a warning, of a file that is damaged."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
        if isinstance(found, dict) and isinstance(found.get("before", []), list):
            return found
    except ValueError:  # no JSON, no UTF-8
        pass
    log.warning("%s: damaged; it is written again", path)
    return {}


def _is_checkout(directory: Path) -> bool:
    """Whether git tracks what lies there: an installed package may lie in the repository of somebody else's project."""
    return bool(_git(directory, "ls-files", "__init__.py"))


def _git(directory: Path, *arguments: str) -> str | None:
    """The output of git; None if it fails: without git, outside of a repository."""
    try:
        result = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
