"""The norms that the model has."""

from torch import nn

from morphtrain import schema


def build(config: schema.norm.Norm, model: nn.Module) -> None:
    return None
