"""The model's own norms, unchanged."""

from torch import nn

from morphtrain import schema


def build(config: schema.norm.Norm, model: nn.Module) -> None:
    return None
