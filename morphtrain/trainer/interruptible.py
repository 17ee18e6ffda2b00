"""Passes through a network that a signal can end: a step of a large network on a CPU takes many seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from morphtrain import interrupts
from morphtrain.compilation import Compilation

LONG_SECONDS = 0.2  # a step that took less ends soon enough by itself, and is not slowed down


@contextmanager
def interruptible() -> Iterator[None]:
    """Ask for signals after every module's forward pass, and before its part of the backward pass.

    So within the block a signal waits for one module, and for no whole pass. Nothing that is computed changes.
    """

    def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
        interrupts.check()
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(_before_backward)

    handle = register_module_forward_hook(after_forward)
    try:
        yield
    finally:
        handle.remove()


def _before_backward(gradients: Any) -> None:
    interrupts.check()


class Steps:
    """Makes those steps interruptible that are long, going by the one before: `with steps.next(whole):`.

    Args:
        compilation: of the run, which looks at the steps instead: code that asks for signals cannot be compiled, so one
            waits for the end of a step, however long it is.
    """

    def __init__(self, compilation: Compilation | None) -> None:
        self.compilation = compilation
        self.seconds = LONG_SECONDS  # of the first one nothing is known

    @contextmanager
    def next(self, whole: bool) -> Iterator[None]:
        """One step, on a whole batch or on less; raises `Interrupted` before it, or, if it is long, also inside."""
        interrupts.check()
        start = time.perf_counter()
        with self._watched(whole):
            yield
        self.seconds = time.perf_counter() - start

    def _watched(self, whole: bool) -> AbstractContextManager[None]:
        if self.compilation is not None:
            return self.compilation.step(whole)
        return interruptible() if self.seconds >= LONG_SECONDS else nullcontext()
