"""Parameters of a network."""

from torch import nn


def count_params(model: nn.Module) -> int:
    """How many parameters `model` has, trained and frozen; shared ones count once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())
