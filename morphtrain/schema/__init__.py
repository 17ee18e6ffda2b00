"""The typed config: one module per group, one dataclass per option, its ranges checked where they are declared.

`conf/` holds the defaults and explains every key; this package holds types and ranges, and imports neither torch nor
anything else that is slow. `parse` turns a composed Hydra config into these dataclasses, or raises a `UserError` that
names the key, the value and what would work.
"""

import importlib
import pkgutil

from morphtrain.schema import (
    batch_policy,
    data,
    gradient,
    grow,
    loss,
    model,
    norm,
    optimizer,
    precision,
    prune,
    schedule,
    sweeper,
    timing,
    tracking,
)
from morphtrain.schema.checks import check, check_one_of
from morphtrain.schema.config import METRICS, TESTED, Config
from morphtrain.schema.custom import Custom
from morphtrain.schema.files import CONF
from morphtrain.schema.max_batch import MaxBatch
from morphtrain.schema.option import OPTIONS, Option, keywords, option_of, size_keys
from morphtrain.schema.parse import (
    check_sweeper,
    compose,
    own_directories,
    parse,
    parse_max_batch,
    stored_option,
    typed,
)

for _module in pkgutil.iter_modules(__path__):  # an option may have a module of its own
    importlib.import_module(f"{__name__}.{_module.name}")

for _group in OPTIONS:
    if _group != "timing":  # whose keys say how the user's own parts are clocked, too
        OPTIONS[_group].setdefault("custom", Custom)

__all__ = [
    "CONF",
    "METRICS",
    "OPTIONS",
    "TESTED",
    "Config",
    "Custom",
    "MaxBatch",
    "Option",
    "batch_policy",
    "check",
    "check_one_of",
    "check_sweeper",
    "compose",
    "data",
    "gradient",
    "grow",
    "keywords",
    "loss",
    "model",
    "norm",
    "optimizer",
    "option_of",
    "own_directories",
    "parse",
    "parse_max_batch",
    "precision",
    "prune",
    "schedule",
    "size_keys",
    "stored_option",
    "sweeper",
    "timing",
    "tracking",
    "typed",
]
