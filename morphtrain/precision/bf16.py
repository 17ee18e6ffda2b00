"""Mixed precision by operation in bfloat16, without a loss scale."""

import torch

from morphtrain import schema
from morphtrain.precision.autocast import Precision, warn_if_slow


def build(config: schema.precision.Precision, device: torch.device) -> Precision:
    warn_if_slow(config.name, device, torch.bfloat16)
    return Precision(device, torch.bfloat16, init_scale=None)
