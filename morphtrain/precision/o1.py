"""Mixed precision by operation (AMP level O1): float16 with loss scaling, or bfloat16 where that is not native."""

import torch

from morphtrain import schema
from morphtrain.precision.autocast import Precision, warn_if_slow


def build(config: schema.precision.Autocast, device: torch.device) -> Precision:
    """`dtype=auto` is float16 on CUDA and bfloat16 elsewhere: CPUs emulate float16, which is slow."""
    name = config.dtype
    if name == "auto":
        name = "float16" if device.type == "cuda" else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    warn_if_slow(config.name, device, dtype)
    return Precision(device, dtype, config.init_scale)
