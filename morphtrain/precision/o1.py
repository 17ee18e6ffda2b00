"""Mixed precision by operation (AMP level O1): float16 with loss scaling, or bfloat16 where that is not native."""

import torch

from morphtrain import schema
from morphtrain.precision.autocast import Precision, chosen_type, warn_if_slow


def build(config: schema.precision.Mixed, device: torch.device) -> Precision:
    dtype = chosen_type(config.dtype, device)
    warn_if_slow(config.name, device, dtype)
    return Precision(device, dtype, config.init_scale)
