"""Parameters of a network."""

from torch import nn


def count_params(model: nn.Module) -> int:
    """Number of trainable and frozen parameters; shared ones count once, buffers do not."""
    return sum(parameter.numel() for parameter in model.parameters())
