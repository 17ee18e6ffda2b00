"""Linear warm-up before any schedule."""

from morphtrain.contracts import Schedule


def with_warmup(schedule: Schedule, warmup_epochs: float) -> Schedule:
    """`schedule` times a linear rise from 0 to 1 over the first `warmup_epochs` (Goyal et al. 2017, section 2.2)."""

    def factor(epochs_done: float) -> float:
        if epochs_done < warmup_epochs:
            return schedule(epochs_done) * epochs_done / warmup_epochs
        return schedule(epochs_done)

    return factor
