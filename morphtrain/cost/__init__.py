"""What a network costs before it is trained. Imports torch and nothing else of MorphTrain."""

from morphtrain.cost.macs import count_macs
from morphtrain.cost.memory import MemoryModel, estimate_memory, max_batch, memory_model
from morphtrain.cost.params import count_params
from morphtrain.cost.roofline import Roofline, measure_roofline

__all__ = [
    "MemoryModel",
    "Roofline",
    "count_macs",
    "count_params",
    "estimate_memory",
    "max_batch",
    "measure_roofline",
    "memory_model",
]
