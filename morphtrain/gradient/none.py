"""Gradients are those of the loss."""

from morphtrain import schema


def build(config: schema.gradient.Gradient) -> None:
    return None
