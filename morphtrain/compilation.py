"""Training passes through torch.compile: which of them, what it costs, and when it is worth it again.

The network itself stays as it is. The code that is compiled of it is for one structure and one shape of batches. When
either changes, it is dropped, and the network is compiled again once that pays:

    min(epochs left, epochs since the change) * seconds saved in an epoch > seconds of a compilation

All of these are measured: compiling begins in the middle of an epoch, whose steps before and after it are timed. The
second term keeps a network that changes every few epochs from being compiled for each of them: as with renting skis,
nobody knows when the next change comes, and to buy once the rent has come to the price costs at most twice what it
would have cost to know.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from morphtrain import interrupts
from morphtrain.cost.stopwatch import wait_for
from morphtrain.errors import UserError, said
from morphtrain.memory_limit import is_out_of_memory
from morphtrain.world import agree, largest

# Modes of torch.compile, by the values of config key `compile`. With CUDA graphs ("max-autotune") a step would write
# into the outputs of the one before, and networks that change leave their memory behind.
MODES = {"default": "default", "max": "max-autotune-no-cudagraphs"}
BACKEND = "inductor"
EAGER_STEPS, COMPILED_STEPS = 4, 8  # timed of each kind in an epoch that begins to compile; the first ones warm up

STATE = ("active", "measured", "since", "shape", "seconds", "ratio")
TYPES: dict[str, Any] = {  # of what a checkpoint holds
    "active": bool,
    "measured": bool,
    "since": int,
    "shape": list[int] | None,
    "seconds": float | None,
    "ratio": float | None,
}

log = logging.getLogger(__name__)


class Compilation:
    """Decides which passes of a run go through compiled code, and measures what that takes and saves.

    Passes of another shape than most have, such as those of an epoch's last batch, are not compiled.

    Args:
        mode: a key of MODES.
        device: that trains, to wait for where steps are timed.

    Attributes:
        active: whether the present network is compiled.
        measured: whether an epoch with the present code is over, so that its steps need not be timed.
        since: the epoch after which the network or its batches have last changed.
        shape: (B, C, H, W) of the images that the code is for; None: it is not known yet.
        seconds: of the last compilation; None: there was none.
        ratio: of a step's time with the last code to that without; None: not known.
        spent_seconds: what compiling has taken in the latest epoch.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        self.mode, self.device = mode, device
        self.active, self.measured, self.since = True, False, 0
        self.shape: list[int] | None = None
        self.seconds: float | None = None
        self.ratio: float | None = None
        self.spent_seconds = 0.0
        self._code: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._latest: list[int] | None = None  # shape of the latest pass of the usual size
        self._usual = 0  # images in most passes of a whole batch
        self._eager_left = 0  # whole batches that are still trained without the code
        self._in_code = False  # whether the present step may use it
        self._times: dict[bool, list[float]] = {False: [], True: []}  # of steps of this epoch, without code and with it

    def begin_epoch(self, whole_batches: int, usual: int) -> None:
        """Prepare for an epoch of so many whole batches, most of whose passes have `usual` images."""
        self._usual = usual
        if self.shape is not None and self._code is None:  # of a checkpoint, whose shares may have been others
            self.shape = [usual, *self.shape[1:]] if usual else None
        self._times = {False: [], True: []}
        begins = self.active and not self.measured and self._code is None
        self._eager_left = min(EAGER_STEPS, whole_batches // 3) if begins else 0
        self.spent_seconds = 0.0

    @contextmanager
    def step(self, whole: bool) -> Iterator[None]:
        """A training step, on a whole batch or on less; raises a `UserError` if its network cannot be compiled."""
        self._in_code = self.active and not self._eager_left
        begins = self._in_code and self._code is None
        enough = self.measured or len(self._times[True]) > COMPILED_STEPS
        timed = self.active and whole and (begins or not enough)
        if timed:
            wait_for(self.device)
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error) or not _is_of_the_compiler(error):
                raise
            interrupts.check()  # a signal to all processes of a terminal ends a C++ compiler too
            raise UserError(f"compile={self.mode}: {_reason(error)}; compile=none trains without it") from error
        if timed:
            wait_for(self.device)
            self._times[self._in_code].append(time.perf_counter() - start)
        if whole and self._eager_left:
            self._eager_left -= 1

    def __call__(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """The logits (B, classes) of images (B, C, H, W) in training."""
        shape = list(images.shape)
        if len(images) == self._usual:
            self._latest = shape
            if self._in_code and self.shape is None:
                self.shape = shape
        if not self._in_code or shape != self.shape:
            logits: torch.Tensor = model(images)
            return logits
        if self._code is None:
            self._code = compiled(model, self.mode)
        return self._code(images)

    def end_epoch(self, epoch: int, epochs: int, seconds: float, changed: bool, usual: int) -> None:
        """Take account of an epoch, and decide about the next: the same in every process.

        Args:
            epoch, epochs: the one that has ended, and how many there are.
            seconds: that its training took, without waiting for data.
            changed: whether the network's structure has changed after it.
            usual: images in most passes of the next one's whole batches.
        """
        self._measure()
        compiled = agree(self._code is not None)
        self.measured = self.active and compiled
        others = self.shape is not None and (usual != self.shape[0] or self._latest != self.shape)
        if changed or largest(others):  # in any process
            self._drop("the network or its batches have changed; on again when that pays")
            self.since = epoch
        elif self.active and not compiled:
            self._drop(f"no step on a whole batch had a pass of {self._usual} images")
        elif self.active and self.ratio is not None and self.ratio >= 1:
            self._drop(f"steps are no faster with it ({self.ratio:.2f} of the time without)")
        elif not self.active and self.ratio is not None and self.seconds is not None:
            saved = (1 - self.ratio) * agree(seconds)
            left, lasted = epochs - epoch, epoch - self.since
            if min(left, lasted) * saved > self.seconds:
                self.active, self.measured = True, False
                log.info(
                    "compile=%s: compiled again: %.3g s once, and %.3g s less in each of %d epochs",
                    *(self.mode, self.seconds, saved, left),
                )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide alike: plain data."""
        return {key: getattr(self, key) for key in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for key in STATE:
            setattr(self, key, state[key])

    def _measure(self) -> None:
        """What compiling took in this epoch and, if the code is new, what it saves: as the main process found it."""
        eager, (first, *later) = self._times[False], self._times[True] or [0.0]
        usual = statistics.median(later) if later else 0.0
        self.spent_seconds = max(first - usual, 0.0)
        known = later and eager
        ratio = usual / statistics.median(eager[1:] or eager) if known else None
        new, seconds, ratio = agree((bool(self._times[True]) and not self.measured, self.spent_seconds, ratio))
        if not new:
            return
        self.seconds, self.ratio = seconds, ratio
        gain = f"; steps take {self.ratio:.2f} of the time without it" if self.ratio is not None else ""
        log.info("compile=%s: took %.3g s%s", self.mode, self.seconds, gain)

    def _drop(self, why: str) -> None:
        """Forget the code, which frees what it holds."""
        if self.active:
            log.info("compile=%s: off: %s", self.mode, why)
        self.active, self.measured, self.shape, self._code = False, False, None, None


def usual_pass(batch_size: int, parts: int) -> int:
    """Images in most of the passes of a whole batch, which differ by at most one."""
    least, larger = divmod(batch_size, parts)
    return least + 1 if 2 * larger > parts else least


def compiled(model: nn.Module, mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's forward pass, compiled when it is first called, for the shape and structure that it has then."""

    def network(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(images)
        return logits

    # torch keeps what it compiles with the code object of a function, of which this would be the same one every time.
    network.__code__ = network.__code__.replace()
    if BACKEND == "inductor":
        _check_cache()
    code = torch.compile(network, backend=BACKEND, mode=MODES[mode], dynamic=False)
    from torch._dynamo import config, eval_frame  # slow to import

    hooks_guarded = config.patch(skip_nnmodule_hook_guards=False)  # or one that a method sets later is never called

    def run(images: torch.Tensor) -> torch.Tensor:
        with hooks_guarded:
            logits: torch.Tensor = code(images)
            return logits

    # What torch keeps with a function and the function keep each other alive.
    weakref.finalize(run, eval_frame.remove_from_cache, network.__code__).atexit = False
    return run


def _check_cache() -> None:
    """Raise a `UserError` if the directory where torch keeps compiled code, which it runs, is somebody else's."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    directory = Path(cache_dir())
    if directory.stat().st_uid != os.getuid():
        raise UserError(
            f"compile: {directory} belongs to somebody else, and torch runs the code that it finds there; "
            "TORCHINDUCTOR_CACHE_DIR=... names a directory of your own"
        )


def _is_of_the_compiler(error: BaseException) -> bool:
    """Whether torch.compile has raised an error, or what made it do so."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return any(type(one).__module__.startswith(("torch._dynamo", "torch._inductor")) for one in chain)


def _reason(error: Exception) -> str:
    """What the compiler says, in a line."""
    inner = getattr(error, "inner_exception", error)
    if type(inner).__name__ == "InvalidCxxCompiler":
        return "torch.compile needs a C++ compiler, and there is none (g++, or what CXX names)"
    lines = [line.strip() for line in str(inner).splitlines()]
    return next((line for line in lines if " error: " in line), said(inner))
