"""Which parameters get weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from morphtrain.morph.computation import is_weight_norm, originals


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights, which decay, and vectors (norm parameters, biases), which do not.

    Under weight norm, w = g * v / ||v||, the weights are g: its decay is that of w, as ||w|| = |g|. The directions v
    are a third group, which does not decay: v has no effect but by its direction, and a smaller v would turn faster.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    lists = [m for m in model.modules() if isinstance(m, ParametrizationList) and is_weight_norm(m)]
    directions = {id(originals(computed)[1]) for computed in lists}
    lengths = {id(g) for g, v in map(originals, lists) if v.dim() > 1}  # a single one, of a whole weight, has no dims
    weights = [p for p in trained if id(p) in lengths or (p.dim() > 1 and id(p) not in directions)]
    chosen = directions | set(map(id, weights))
    groups = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in chosen], "weight_decay": 0.0},
    ]
    if directions:
        groups.append({"params": [p for p in trained if id(p) in directions], "weight_decay": 0.0})
    return groups
