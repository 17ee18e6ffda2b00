"""What a network costs before it is trained. Imports torch and nothing else of MorphTrain."""

from morphtrain.cost.macs import count_macs
from morphtrain.cost.params import count_params
from morphtrain.cost.roofline import Roofline, measure_roofline

__all__ = ["Roofline", "count_macs", "count_params", "measure_roofline"]
