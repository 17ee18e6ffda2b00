"""Growing a network while it trains: one module an option of the `grow` group; `widen` and `expand_to` for any loop."""

from morphtrain.grow.expand import expand_to
from morphtrain.grow.net2net import widen

__all__ = ["expand_to", "widen"]
