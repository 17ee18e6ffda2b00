"""A training step reads no value off the device: on a GPU the host would have to wait for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from conftest import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

import morphtrain
from morphtrain.state import Run
from morphtrain.trainer import loop
from morphtrain.trainer.build import build_run
from morphtrain.trainer.epoch import begin_epoch, start
from morphtrain.trainer.loop import train_epoch, training_steps
from morphtrain.trainer.share import Share

# What needs a tensor's values on the host: numbers of it, or how many results there are.
READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive")
MAKES = ("lift_fresh",)  # a tensor of Python numbers, which waits for the device that it is copied to
ALWAYS = "prune.start_epoch=1"  # from the first epoch on the penalty acts


class Reads(TorchDispatchMode):
    """Collects the operations that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = [part for index in args[1:2] if isinstance(index, (list, tuple)) for part in index]
        by_mask = name == "index" and any(isinstance(m, torch.Tensor) and m.dtype is torch.bool for m in masks)
        if name in (*READS, *MAKES) or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def reads_of_steps(run: Run) -> list[str]:
    """What the steps of an epoch read after the first one, which may fix what the others go by, up to its end."""
    start(run)
    begin_epoch(run)
    steps = training_steps(run)
    next(steps)
    with Reads() as reads:
        for _ in range(len(run.data.train) // run.batch_size - 1):
            next(steps)
    return reads.found


def built(*overrides: str) -> Run:
    return build_run(morphtrain.compose(*SMALL, "tracking=none", "device=cpu", "prune.start_epoch=1", *overrides))


OPTIONS = [
    [ALWAYS, "clip_norm=1", "memory_format=channels_last", "precision=bf16", "ema=0.5"],
    [ALWAYS, "prune.update=subgradient", "prune.residual=gating", "norm=ghost", "norm.ghost_batch_size=6"],
    [ALWAYS, "optimizer=lars", "batch_policy.max_micro_batch=6", "data.train_samples=250"],
    [ALWAYS, "optimizer=adamw", "optimizer.fused=true"],
    [ALWAYS, "optimizer.fused=true", "clip_norm=1"],
    [ALWAYS, "norm=weight", "norm.mean_only=true"],
    ["prune=morphnet", "prune.start_epoch=1", "prune.regulariser=group_lasso", "norm=weight"],
    ["prune=morphnet", "grow=adaptive", "batch_policy=adabatch"],
    [ALWAYS, "data=digits", "schedule=milestones"],
    [ALWAYS, "precision=dfp16", "precision.rounding=stochastic", "clip_norm=1"],
    [ALWAYS, "gradient=approximate", "gradient.kind=random", "gradient.share=1", "precision=bf16"],
    [ALWAYS, "gradient=sparse_activation", "batch_policy.max_micro_batch=6"],
    ["prune=morphnet", "prune.start_epoch=1", "optimizer=adamw", "optimizer.fused=true", "precision=bf16_pure"],
    [ALWAYS, "precision=o3", "ema=1"],
]


def run_of(options: list[str], device: str) -> Run:
    keys = {option.split("=")[0] for option in options}
    own = [o for o in SMALL if o.split("=")[0] not in keys]
    if "prune=morphnet" in options:
        own = [o for o in own if not o.startswith("prune.")]
    if "data=digits" in options:
        own = [o for o in own if not o.startswith("data.")]
    return build_run(morphtrain.compose(*own, "tracking=none", f"device={device}", *options))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_reads_nothing(options: list[str]) -> None:
    assert reads_of_steps(run_of(options, "cpu")) == []


def test_what_reads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(run: Run, share: Share) -> bool:
        return bool(run.loss > 0) and bool(share.labels[share.labels > 0].sum().item() >= 0)

    monkeypatch.setattr(loop, "take_step", step)
    assert {"_local_scalar_dense", "index"} <= set(reads_of_steps(built()))


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_a_gpu_is_not_waited_for(options: list[str]) -> None:
    run = run_of(options, "cuda")
    start(run)
    begin_epoch(run)
    steps = training_steps(run)
    next(steps)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(len(run.data.train) // run.batch_size - 1):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    train_epoch(run)
