"""Linear decay to zero."""

from morphtrain import schema
from morphtrain.contracts import Schedule
from morphtrain.schedule.warmup import with_warmup


def build(config: schema.schedule.Schedule, epochs: int) -> Schedule:
    return with_warmup(lambda done: 1 - min(done / epochs, 1), config.warmup_epochs)
