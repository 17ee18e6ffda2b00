"""Step decay: times gamma at each milestone."""

from morphtrain import schema
from morphtrain.contracts import Schedule
from morphtrain.schedule.warmup import with_warmup


def build(config: schema.schedule.Milestones, epochs: int) -> Schedule:
    passed = [milestone * epochs for milestone in config.milestones]
    return with_warmup(lambda done: config.gamma ** sum(done >= m for m in passed), config.warmup_epochs)
