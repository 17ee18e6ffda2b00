"""The norms that the model has."""

from torch import nn

from morphtrain import schema


def build(config: schema.Nothing, model: nn.Module) -> None:
    return None
