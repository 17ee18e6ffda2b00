"""Code of the user's own as a side of a comparison: `--vs script.py`, `--vs script.py:train`, `--vs my_package.loop`.

It defines `epoch()`, or with `--steps` `step()`, or the function that is named: it does the work of one epoch, or of
one training step, takes no arguments, and what it returns is not used. If it defines `setup()`, that is called once
before. The device is idle before and after each call, and the call alone is clocked.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from morphtrain import interrupts
from morphtrain.compare.turns import Spent, spent
from morphtrain.errors import UserError, said


def clocked(target: str, unit: str, device: torch.device) -> Iterator[Spent]:
    """What the function that `--vs` names takes, whenever it is asked for; its module's `setup()` comes first.

    Args:
        target: FILE.py or MODULE, perhaps followed by :FUNCTION.
        unit: the name of the function if none is given.
        device: is idle before and after each call.

    Raises:
        UserError: if there is no such file, module or function, or it fails.
    """
    place, _, name = target.partition(":")
    name = name or unit
    load = partial(_from_file, Path(place)) if place.endswith(".py") else partial(_module, place)
    module = _attempt(target, "importing it", load)
    function = getattr(module, name, None)
    if not callable(function):
        hint = "with --steps it is step, otherwise epoch, or FILE.py:NAME"
        raise UserError(f"--vs {target}: has no function {name}; {hint}")
    if (setup := getattr(module, "setup", None)) is not None:
        _attempt(target, "setup()", setup)
    work = partial(spent, function, device)
    return (_attempt(target, f"{name}()", work) for _ in itertools.count())


def _from_file(path: Path) -> ModuleType:
    """The module in a file, which finds its neighbours as it does when Python runs it."""
    if not path.is_file():
        raise UserError(f"--vs {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"{__name__}.{path.stem}", path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    """A module, from the current directory as well."""
    sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _attempt(target: str, what: str, work: Callable[[], Any]) -> Any:
    """Do it; a failure is a `UserError`, and a signal ends it there and then, since nobody asks for it inside."""
    try:
        with interrupts.at_once():
            return work()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"--vs {target}: {what} fails: {said(error)}; HYDRA_FULL_ERROR=1 shows where") from error
