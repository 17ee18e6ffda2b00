"""The typed config: one dataclass a group option, its ranges checked where they are declared.

`conf/` holds the defaults and explains every key; this package holds types and ranges, and imports neither torch nor
anything else that is slow. `parse` turns a composed Hydra config into these dataclasses, or raises a `UserError` that
names the key, the value and what would work.
"""

from morphtrain.schema.batch_policy import AdaBatch, FillMemory, FixedBatch
from morphtrain.schema.checks import COSTS, check, check_one_of
from morphtrain.schema.config import (
    METRICS,
    OPTIONS,
    Config,
    MaxBatch,
    Nothing,
    keywords,
    option_of,
    parse,
    parse_max_batch,
    stored_option,
)
from morphtrain.schema.data import Digits, Downloaded, ImageFolder, Synthetic
from morphtrain.schema.grow import Adaptive, Deeper, GrowMorphNet, Planned, Selective, Wider
from morphtrain.schema.model import IMAGE_KINDS, VGG, AlexNet, Custom, MobileNet, ResNet, Torchvision
from morphtrain.schema.prune import MorphNet, PruneTrain
from morphtrain.schema.training import LARS, SGD, AdamW, Annealing, Autocast, GhostNorm, Milestones, MLflow, Timing

__all__ = [
    "COSTS",
    "IMAGE_KINDS",
    "LARS",
    "METRICS",
    "OPTIONS",
    "SGD",
    "VGG",
    "AdaBatch",
    "AdamW",
    "Adaptive",
    "AlexNet",
    "Annealing",
    "Autocast",
    "Config",
    "Custom",
    "Deeper",
    "Digits",
    "Downloaded",
    "FillMemory",
    "FixedBatch",
    "GhostNorm",
    "GrowMorphNet",
    "ImageFolder",
    "MLflow",
    "MaxBatch",
    "Milestones",
    "MobileNet",
    "MorphNet",
    "Nothing",
    "Planned",
    "PruneTrain",
    "ResNet",
    "Selective",
    "Synthetic",
    "Timing",
    "Torchvision",
    "Wider",
    "check",
    "check_one_of",
    "keywords",
    "option_of",
    "parse",
    "parse_max_batch",
    "stored_option",
]
