"""Parameters of a network."""

from torch import nn

from morphtrain.morph.effective import tensors_in_use


def count_params(model: nn.Module) -> int:
    """How many parameters `model` has, trained and frozen; shared ones count once, buffers do not count.

    Of a computed weight those that it is computed from count: with weight norm, one for each output more.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_weights(model: nn.Module, threshold: float = 0.0) -> int:
    """Weights of convolutions and linear layers with |w| >= threshold, as the layers use them."""
    weights = [w for w in tensors_in_use(model) if w.dim() > 1]
    return sum(int((w.detach().abs() >= threshold).sum()) for w in weights)
