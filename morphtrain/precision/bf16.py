"""Mixed precision by operation in bfloat16, without a loss scale."""

import torch

from morphtrain import schema
from morphtrain.precision.autocast import Precision


def build(config: schema.Nothing, device: torch.device) -> Precision:
    return Precision(device, torch.bfloat16)
