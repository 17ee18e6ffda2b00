"""The mean cross-entropy."""

from torch.nn import functional as F

from morphtrain import schema
from morphtrain.contracts import Loss


def build(config: schema.loss.Loss, num_classes: int) -> Loss:
    return F.cross_entropy
