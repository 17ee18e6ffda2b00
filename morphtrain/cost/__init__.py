"""What a network costs before it is trained. Imports torch and nothing else of MorphTrain."""

from morphtrain.cost.macs import count_macs
from morphtrain.cost.params import count_params

__all__ = ["count_macs", "count_params"]
