"""Dynamic fixed point with 16 bits, emulated: what it does to accuracy (Das et al. 2018, arXiv 1802.00930)."""

from __future__ import annotations

import torch

from morphtrain import schema
from morphtrain.precision.autocast import Precision
from morphtrain.precision.fixed_point import QuantisedLayers


class DynamicFixedPoint(Precision):
    """Parameters of 32 bits, which every convolution and linear layer reads in dynamic fixed point.

    Stochastic rounding draws from torch's own random numbers. The loop seeds them at the start of each epoch, so that a
    resumed run draws the same.

    Args:
        bits, rounding: as in `morphtrain.precision.fixed_point.quantise`.
    """

    def __init__(self, device: torch.device, bits: int = 16, rounding: str = "nearest") -> None:
        super().__init__(device)
        self.bits, self.rounding = bits, rounding

    def context(self, device_type: str) -> QuantisedLayers:
        """The context of a forward pass on any device."""
        return QuantisedLayers(self.bits, self.rounding)

    def autocast(self) -> QuantisedLayers:
        """The context of a forward pass, in training, in evaluation, and where batch norm is settled."""
        return self.context(self.device.type)


def build(config: schema.precision.FixedPoint, device: torch.device) -> DynamicFixedPoint:
    return DynamicFixedPoint(device, config.bits, config.rounding)
