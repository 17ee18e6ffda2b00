"""torch.profiler over some steps of a run (`timing.profile`): a trace and a table for each epoch that has any of them.

profile/epoch_0003.json.gz    for https://ui.perfetto.dev or chrome://tracing
profile/epoch_0003.txt        a table
"""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from morphtrain.files import write_atomically
from morphtrain.state import Run
from morphtrain.trainer.epoch import Judge, Record
from morphtrain.trainer.loop import training_steps

FOLDER = "profile"
ROWS = 10  # of the table
BETWEEN = "a step, outside of operations"
QUIET = "6"  # it would print that it starts and stops, and that there is no GPU

log = logging.getLogger(__name__)


class StepProfiler:
    """Profiles the steps first to last of a run, counted from 1 over all its epochs, those before a resume too.

    Recording is on in these steps only: neither in evaluation nor in what methods do between epochs. An epoch with such
    a step is slower, and its record says `profiled`. With several processes each makes the same steps; the first one's
    are profiled.

    Args:
        steps: the pair; None profiles nothing, and leaves records as they are.
        run_dir: where the files go.
    """

    def __init__(self, steps: Sequence[int] | None, run_dir: Path) -> None:
        self.steps, self.folder = steps, run_dir / FOLDER
        self.running: profile | None = None
        self.taken: profile | None = None  # of this epoch
        self.numbers = range(0)  # of the steps in it

    def training_steps(self, run: Run) -> Iterator[int]:
        """The steps of an epoch, as `loop.training_steps`, with the profiler on in those that are asked for."""
        self.taken, self.numbers = None, range(0)
        return training_steps(run) if self.steps is None else self._profiled(run, *self.steps)

    def _profiled(self, run: Run, first: int, last: int) -> Iterator[int]:
        before = sum(map(steps_of, run.history))
        end = before + math.ceil(run.epoch_images / run.batch_size)
        wanted = range(max(first, before + 1), min(last, end) + 1)
        steps = training_steps(run)
        try:
            for number in count(before + 1):
                if wanted and number == wanted.start:
                    self._start(run.device)
                with record_function(f"step {number}"):
                    images = next(steps, None)
                if images is None:  # InfoBatch has left some out
                    wanted = range(wanted.start, number)
                if self.running is not None and (images is None or number == wanted.stop - 1):
                    self._stop(wanted)
                if images is None:
                    break
                yield images
        finally:
            if self.running is not None:  # an interrupted step
                self._stop(range(0))

    def _start(self, device: torch.device) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
        of_device = {"cuda": [ProfilerActivity.CUDA], "xpu": [ProfilerActivity.XPU]}
        self.running = profile(activities=[ProfilerActivity.CPU, *of_device.get(device.type, [])])
        self.running.start()

    def _stop(self, numbers: range) -> None:
        assert self.running is not None
        self.running.stop()
        self.taken, self.numbers, self.running = self.running, numbers, None

    def marked(self, judge: Judge) -> Judge:
        """The judge of an epoch's record, which then also says whether the epoch was profiled."""
        if self.steps is None:
            return judge

        def judged(record: Mapping[str, float], history: Sequence[Mapping[str, float]]) -> Record:
            return judge({**record, "profiled": float(bool(self.numbers))}, history)

        return judged

    def write(self, run: Run) -> list[Path]:
        """Write what this epoch's steps gave, and print the table; the paths of the files, none without such a step."""
        if self.taken is None or not self.numbers:
            return []
        table = _table(self.taken, run.device)
        first, last = self.numbers.start, self.numbers.stop - 1
        trace, text = (self.folder / f"epoch_{run.epoch:04d}{suffix}" for suffix in (".json.gz", ".txt"))
        self.folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as place:
            exported = Path(place, trace.name)
            self.taken.export_chrome_trace(str(exported))
            write_atomically(trace, exported.read_bytes())
        title = (
            f"steps {first} to {last}, in epoch {run.epoch}: the {ROWS} operations that took the most time themselves"
        )
        write_atomically(text, f"{title}\n{table}".encode())
        log.info("%s\n%strace: %s, for https://ui.perfetto.dev", title, table, trace)
        self.taken = None  # which holds all events
        return [trace, text]

    def warn_of_none(self, history: Sequence[Mapping[str, float]]) -> None:
        """Log a warning if the run has ended, and no step of it was profiled."""
        if self.steps is not None and not any(record.get("profiled") for record in history):
            steps = sum(map(steps_of, history))
            log.warning("timing.profile=%s: none was profiled; the run had the steps 1 to %d", list(self.steps), steps)


def steps_of(record: Mapping[str, float]) -> int:
    """How many training steps an epoch had, by its record."""
    images = round(record["samples_per_second"] * record["epoch_seconds"])
    return math.ceil(images / record["batch_size"])


def _table(taken: profile, device: torch.device) -> str:
    """The dearest operations; what a CPU's steps take outside of any, in Python, is one row of all steps.

    On a device the spans of steps and of the optimizer are no operations: each would take what is in it, once more.
    """
    averages: Any = taken.key_averages()
    kind = "cpu" if device.type in ("cpu", "mps") else "device"
    steps = [row for row in averages if re.fullmatch(r"step \d+", row.key)]
    for row in steps:
        row.key = BETWEEN
    for row in steps[1:]:
        steps[0].add(row)
        averages.remove(row)
    if kind == "device":
        for row in [row for row in averages if row.is_user_annotation or row.key == BETWEEN]:
            averages.remove(row)
    return str(averages.table(sort_by=f"self_{kind}_time_total", row_limit=ROWS, max_name_column_width=40))
