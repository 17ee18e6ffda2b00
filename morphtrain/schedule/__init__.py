"""Learning-rate schedules: one module an option of the `schedule` group.

A schedule is a function of the epochs done so far, fractions included, that returns the factor on `optimizer.lr`. It
has no state: a resumed run asks it again, and a changed batch size does not stretch it.
"""

from morphtrain.schedule.warmup import Schedule

__all__ = ["Schedule"]
