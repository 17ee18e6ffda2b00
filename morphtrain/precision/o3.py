"""16 bits throughout (AMP level O3): parameters too, without masters or a loss scale. A bound on speed, not stable."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.morph import in_type
from morphtrain.precision.autocast import Precision, chosen_type, warn_if_slow
from morphtrain.precision.casting import Casting


class Short(Casting):
    """Parameters and buffers of 16 bits; with `keep_batchnorm_fp32`, those of batch norms stay in 32."""

    def __init__(self, device: torch.device, dtype: torch.dtype, keep_batchnorm_fp32: bool) -> None:
        super().__init__(device, dtype)
        self.kept: tuple[type[nn.Module], ...] = (_BatchNorm,) if keep_batchnorm_fp32 else ()

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        in_type(model, self.dtype, besides=self.kept)
        for group in optimizer.param_groups:
            if any(parameter.dtype is self.dtype for parameter in group["params"]):
                _check_eps(group.get("eps"), self.dtype)


def _check_eps(eps: Any, dtype: torch.dtype) -> None:
    """Raise a `UserError` if what an optimizer adds to a divisor is zero in 16 bits; None: it adds nothing."""
    if isinstance(eps, float) and not torch.tensor(eps, dtype=dtype):
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"optimizer.eps={eps:g}: is zero in {name}, in which precision=o3 divides by it; optimizer.eps=1e-5, "
            "or precision=o2, works"
        )


def build(config: schema.precision.Short, device: torch.device) -> Precision:
    dtype = chosen_type(config.dtype, device)
    warn_if_slow(config.name, device, dtype)
    return Short(device, dtype, config.keep_batchnorm_fp32)
