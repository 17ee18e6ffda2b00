"""Steps: times gamma at each milestone."""

from morphtrain import schema
from morphtrain.schedule.warmup import Schedule, with_warmup


def build(config: schema.Milestones, epochs: int) -> Schedule:
    passed = [milestone * epochs for milestone in config.milestones]
    return with_warmup(lambda done: config.gamma ** sum(done >= m for m in passed), config.warmup_epochs)
