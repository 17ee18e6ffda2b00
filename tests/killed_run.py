"""`python killed_run.py EVENT:N ...overrides`: the command, which kills itself with SIGKILL at the N-th EVENT.

write    halfway through writing the file of a checkpoint
rename   between writing a checkpoint and giving it its name
renamed  right after that
morph    inside a reconfiguration or a widening, some tensors replaced, some not
adopt    inside an insertion, some blocks inserted, some not
report   after MLflow has an epoch, before the run knows
step     after an optimizer step
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from torch.optim import SGD

from morphtrain import run
from morphtrain.morph.surgery.rebind import Rebinder
from morphtrain.tracking.mlflow import MLflowTracker

event, number = sys.argv.pop(1).split(":")
count = 0


def now() -> bool:
    global count
    count += 1
    return count == int(number)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


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
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    die()


def is_checkpoint(file: Any, *_: Any) -> bool:
    name = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
    return ".pt" in os.path.basename(name)


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
else:
    sys.exit(f"no event '{event}'")

run.main()
