"""The network never grows."""

from morphtrain import schema


def build(config: schema.Nothing) -> None:
    return None
