"""Mixed precision by network (AMP level O2): all of it in 16 bits, with masters of 32 bits and loss scaling."""

import torch

from morphtrain import schema
from morphtrain.precision.autocast import Precision, chosen_type, warn_if_slow
from morphtrain.precision.casting import Casting


def build(config: schema.precision.Mixed, device: torch.device) -> Precision:
    dtype = chosen_type(config.dtype, device)
    warn_if_slow(config.name, device, dtype)
    return Casting(device, dtype, config.init_scale)
