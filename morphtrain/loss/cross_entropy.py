"""The mean cross-entropy."""

from functools import partial

from torch.nn import functional as F

from morphtrain import schema
from morphtrain.contracts import Loss


def build(config: schema.loss.CrossEntropy, num_classes: int) -> Loss:
    """The cross-entropy, of smoothed labels if `config` says so (Szegedy et al. 2016, arXiv 1512.00567, section 7)."""
    if config.label_smoothing == 0:
        return F.cross_entropy
    return partial(F.cross_entropy, label_smoothing=config.label_smoothing)
