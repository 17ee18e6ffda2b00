"""What a network costs before it is trained: parameters, MACs, memory, and the seconds of its layers.

    count_params(model); count_macs(model, (3, 32, 32))              # input shapes are of one sample
    estimate_memory(model, (3, 32, 32), batch_size=128)              # bytes of a training step
    max_batch(model, (3, 32, 32), budget_bytes=11 * 2**30)
    WidthCost(graph, "flops")({space: space.size // 2})              # of other widths than the present ones
    measured_cost(graph, batch_size=128)                             # the same in seconds, measured on this device

Imports torch and `morphtrain.morph`; knows no training loop.
"""

from morphtrain.cost.latency import measured_cost
from morphtrain.cost.macs import count_macs
from morphtrain.cost.max_batch import max_batch
from morphtrain.cost.memory import MemoryModel, estimate_memory, memory_model
from morphtrain.cost.params import count_params
from morphtrain.cost.widths import CostKind, WidthCost

__all__ = [
    "CostKind",
    "MemoryModel",
    "WidthCost",
    "count_macs",
    "count_params",
    "estimate_memory",
    "max_batch",
    "measured_cost",
    "memory_model",
]
