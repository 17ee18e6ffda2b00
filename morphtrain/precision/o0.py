"""32-bit floats throughout (AMP level O0)."""

import torch

from morphtrain import schema
from morphtrain.precision.autocast import Precision


def build(config: schema.precision.Precision, device: torch.device) -> Precision:
    return Precision(device)
