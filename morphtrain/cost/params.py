"""Parameters of a network."""

from torch import nn


def count_params(model: nn.Module) -> int:
    """How many parameters `model` has, trained and frozen; shared ones count once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_weights(model: nn.Module, threshold: float = 0.0) -> int:
    """Weights of convolutions and linear layers with |w| >= threshold."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    return sum(int((w.detach().abs() >= threshold).sum()) for w in weights)
