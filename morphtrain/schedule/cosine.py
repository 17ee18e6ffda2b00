"""Half a cosine down to zero (Loshchilov and Hutter 2016, arXiv 1608.03983, without restarts)."""

import math

from morphtrain import schema
from morphtrain.contracts import Schedule
from morphtrain.schedule.warmup import with_warmup


def build(config: schema.schedule.Schedule, epochs: int) -> Schedule:
    return with_warmup(lambda done: 0.5 * (1 + math.cos(math.pi * min(done / epochs, 1))), config.warmup_epochs)
