"""The fastest of the other options for the run's network, by timed training steps (`morphtrain.trainer.auto`)."""

from __future__ import annotations

import torch

from morphtrain import schema
from morphtrain.precision.autocast import SLOW, Precision, slowdown


def candidates(device: torch.device) -> dict[str, Precision]:
    """What may be chosen on `device`, by the option's name, the most exact first."""
    found = {"o0": Precision(device), "bf16": Precision(device, torch.bfloat16, init_scale=None)}
    if device.type == "cuda":
        found["o1"] = Precision(device, torch.float16)
    return found


def worth_trying(device: torch.device) -> dict[str, Precision]:
    """Those of them that may be fast there: a step in a type that a CPU emulates can take a hundred times as long."""
    return {
        name: precision
        for name, precision in candidates(device).items()
        if precision.dtype is None or slowdown(device, precision.dtype) <= SLOW
    }


def build(config: schema.precision.Precision, device: torch.device) -> Precision:
    """32-bit floats, until the choice is made."""
    return Precision(device)
