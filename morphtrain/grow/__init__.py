"""Growing a network while it trains: a module per option of the `grow` group; `widen` and `expand_to` for any loop."""

from morphtrain.grow.expand import expand_to
from morphtrain.grow.net2net import widen

__all__ = ["expand_to", "widen"]
