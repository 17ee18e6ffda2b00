"""Small runs in every number format."""

from __future__ import annotations

import torch

import morphtrain
from morphtrain import schema
from morphtrain.state import Run
from morphtrain.trainer.build import build_run
from morphtrain.trainer.epoch import begin_epoch, start

DATA = (
    *("data=synthetic", "data.train_samples=64", "data.val_samples=16", "data.image_size=8", "data.num_classes=4"),
    *("batch_policy.batch_size=16", "schedule.warmup_epochs=0", "tracking=none", "device=cpu", "epochs=3"),
)
TINY = (*DATA, "model.width=4", "model.blocks=1")
PLAIN_STEPS = ("optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.weight_decay=0")
SCALED = ("precision.dtype=float16", "precision.init_scale=1024")
FORMATS = {
    "o1": ("precision=o1",),
    "o1 float16": ("precision=o1", *SCALED),
    "o2": ("precision=o2",),
    "o2 float16": ("precision=o2", *SCALED),
    "o3": ("precision=o3",),
    "o3 float16": ("precision=o3", "precision.dtype=float16"),
    "o3 norms": ("precision=o3", "precision.dtype=float16", "precision.keep_batchnorm_fp32=true"),
    "bf16": ("precision=bf16",),
    "bf16_pure": ("precision=bf16_pure",),
    "stochastic": ("precision=bf16_pure", "precision.rounding=stochastic"),
}
HALF, BRAIN = torch.float16, torch.bfloat16


def config_of(*overrides: str) -> schema.Config:
    """Of a ResNet, unless another model is among the overrides."""
    base = DATA if any(override.startswith("model=") for override in overrides) else TINY
    return morphtrain.compose(*base, *overrides)


def begun(*overrides: str) -> Run:
    """A run in its first epoch, before the first step."""
    run = build_run(config_of(*overrides))
    start(run)
    begin_epoch(run)
    return run
