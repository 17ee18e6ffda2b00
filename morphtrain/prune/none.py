"""The network is never pruned."""

from morphtrain import schema


def build(config: schema.Nothing) -> None:
    return None
