"""`python killed_run.py EVENT:N[:FAULT] ...overrides`: the command, to which something happens at the N-th EVENT.

That is SIGKILL, the signal named, such as INT, or one of FAULTS. If SIGNALLED_AT is set, a file of that name then says
when it was.
If UNDISTURBED is set, no run counts as disturbed by others, however busy the machine is.

write    halfway through writing the file of a checkpoint
rename   between writing a checkpoint and giving it its name
renamed  right after that
morph    inside a reconfiguration or a widening, some tensors replaced, some not
adopt    inside an insertion, some blocks inserted, some not
report   after MLflow has an epoch, before the run knows
step     after an optimizer step
build    before the network is made
epoch    after an epoch, before its checkpoint
never    at no time
sql      inside a callback of SQLAlchemy, after a statement of MLflow or Optuna
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from torch.optim import SGD

from morphtrain import run
from morphtrain.errors import UserError
from morphtrain.morph.surgery.rebind import Rebinder
from morphtrain.timing import contention
from morphtrain.timing.contention import Guard
from morphtrain.trainer import train  # noqa: F401 - makes the module of this name, which it hides


def raise_(error: BaseException) -> NoReturn:
    raise error


FAULTS: dict[str, Callable[[], Any]] = {
    "raise": lambda: raise_(ZeroDivisionError("no widgets")),
    "mistake": lambda: raise_(UserError("widgets=3: two work")),
    "exit": lambda: sys.exit(3),
    "leave": lambda: os._exit(7),
    "crash": lambda: ctypes.string_at(0),
    "hang": lambda: time.sleep(1000),
    "grip": lambda: ctypes.PyDLL(None).sleep(1000),  # hangs in native code that never gives Python's lock back
}

TRAIN = sys.modules["morphtrain.trainer.train"]
event, number, *name = sys.argv.pop(1).split(":")
kind = (name or ["KILL"])[0]
count = 0


def now() -> bool:
    global count
    count += 1
    return count == int(number)


def die() -> None:
    if place := os.environ.get("SIGNALLED_AT"):
        Path(place).write_text(str(time.monotonic()))
    if kind in FAULTS:
        FAULTS[kind]()
    else:
        os.kill(os.getpid(), signal.Signals[f"SIG{kind}"])


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
    if kind == "KILL":
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    die()


def is_checkpoint(file: Any, *_: Any) -> bool:
    name = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
    return ".pt" in os.path.basename(name)


if os.environ.get("UNDISTURBED"):
    Guard._reasons = lambda *_: []
    contention.FOREIGN_LIMIT = float("inf")

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
    from morphtrain.tracking.mlflow import MLflowTracker  # slow to import

    around(MLflowTracker, "_send", after=die)
elif event == "step":
    around(SGD, "step", after=die)
elif event == "build":
    around(TRAIN, "build_run", before=lambda *_: die())
elif event == "epoch":
    around(TRAIN, "finish_epoch", after=die)
elif event == "sql":
    from sqlalchemy import Engine
    from sqlalchemy.event import listens_for

    listens_for(Engine, "after_cursor_execute")(lambda *_: die() if now() else None)
elif event != "never":
    sys.exit(f"no event '{event}'")

run.main()
