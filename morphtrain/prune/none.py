"""The network is never pruned."""

from morphtrain import schema


def build(config: schema.prune.Prune) -> None:
    return None
