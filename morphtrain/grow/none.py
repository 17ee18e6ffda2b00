"""The network never grows."""

from morphtrain import schema


def build(config: schema.grow.Grow) -> None:
    return None
