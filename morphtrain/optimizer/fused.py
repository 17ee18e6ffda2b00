"""torch's fused kernels, which take the whole step of all parameters in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from morphtrain.errors import UserError


def fused(optimizer: Optimizer) -> Optimizer:
    """The same optimizer, which takes its steps in fused kernels.

    The step is the same to rounding. An overflow of the loss scale is still found before the step and not in the
    kernel, where the first one would leave a momentum that was never written.

    Raises:
        UserError: for parameters on a device, or of a type, that has no such kernels.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            known = parameter.device.type in _get_fused_kernels_supported_devices()
            if not known or not parameter.is_floating_point():
                where = f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device.type}"
                raise UserError(f"optimizer.fused=true: torch has no such kernel for {where}; false works")
        group["fused"] = True
    optimizer.defaults["fused"] = True
    if isinstance(optimizer, SGD):
        optimizer.register_step_pre_hook(_complete_momenta)
    return optimizer


def _complete_momenta(optimizer: Optimizer, *step: Any) -> None:
    """Give parameters that growth has added a momentum of zero, from which a first step is the same.

    torch's kernel takes groups where all parameters have one, or none.
    """
    for group in optimizer.param_groups:
        trained = [p for p in group["params"] if p.grad is not None] if group["momentum"] else []
        new = [p for p in trained if "momentum_buffer" not in optimizer.state.get(p, {})]
        if len(new) < len(trained):
            for parameter in new:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
