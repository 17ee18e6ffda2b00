"""`python killed_run.py EVENT:N[:SIGNAL] ...overrides`: the command, which signals itself at the N-th EVENT.

The signal is SIGKILL, or the one named, such as INT. If SIGNALLED_AT is set, a file of that name then says when it was.
If UNDISTURBED is set, no run counts as disturbed by others, however busy the machine is.

write    halfway through writing the file of a checkpoint
rename   between writing a checkpoint and giving it its name
renamed  right after that
morph    inside a reconfiguration or a widening, some tensors replaced, some not
adopt    inside an insertion, some blocks inserted, some not
report   after MLflow has an epoch, before the run knows
step     after an optimizer step
never    at no time
sql      inside a callback of SQLAlchemy, after a statement of MLflow or Optuna
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.event import listens_for
from torch.optim import SGD

from morphtrain import run
from morphtrain.morph.surgery.rebind import Rebinder
from morphtrain.timing.contention import Guard
from morphtrain.tracking.mlflow import MLflowTracker

event, number, *name = sys.argv.pop(1).split(":")
kind = signal.Signals[f"SIG{name[0]}"] if name else signal.SIGKILL
count = 0


def now() -> bool:
    global count
    count += 1
    return count == int(number)


def die() -> None:
    if place := os.environ.get("SIGNALLED_AT"):
        Path(place).write_text(str(time.monotonic()))
    os.kill(os.getpid(), kind)


def around(
    owner: Any,
    name: str,
    before: Callable[..., None] | None = None,
    after: Callable[[], None] | None = None,
    counts: Callable[..., bool] = lambda *_: True,
):
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        hit = counts(*args) and now()
        if hit and before:
            before(*args)
        result = original(*args, **kwargs)
        if hit and after:
            after()
        return result

    setattr(owner, name, wrapped)


def truncate_and_die(descriptor: int) -> None:
    if kind == signal.SIGKILL:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    die()


def is_checkpoint(file: Any, *_: Any) -> bool:
    name = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
    return ".pt" in os.path.basename(name)


if os.environ.get("UNDISTURBED"):
    Guard._reasons = lambda *_: []

if event == "write":
    around(os, "fsync", before=truncate_and_die, counts=is_checkpoint)
elif event == "rename":
    around(os, "replace", before=lambda *_: die(), counts=is_checkpoint)
elif event == "renamed":
    around(os, "replace", after=die, counts=is_checkpoint)
elif event == "morph":
    around(Rebinder, "reindex", after=die)
elif event == "adopt":
    around(Rebinder, "adopt", after=die)
elif event == "report":
    around(MLflowTracker, "_send", after=die)
elif event == "step":
    around(SGD, "step", after=die)
elif event == "sql":
    listens_for(Engine, "after_cursor_execute")(lambda *_: die() if now() else None)
elif event != "never":
    sys.exit(f"no event '{event}'")

run.main()
