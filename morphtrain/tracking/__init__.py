"""Records of runs: one module per option of the `tracking` group.

Only this package imports MLflow, TensorBoard and wandb, and only when used.

A tracker has `start`, `update`, `artifact` and `finish`. The checkpoint, not the tracker, is the authoritative record:
each call passes the whole history, and the tracker sends what it has not sent yet, so a failed call loses nothing.
`begin_sweep` and `end_sweep` keep a sweep's own run, the parent of its trials' runs. `mark_disturbed` tags those
that count for nothing. `ready_view` is the page of MLflow's UI on which a study, or all runs, are best looked at.
"""

from morphtrain.tracking.disturbed import mark_disturbed
from morphtrain.tracking.sweep_run import begin_sweep, end_sweep, prepare
from morphtrain.tracking.view import ready_view

__all__ = ["begin_sweep", "end_sweep", "mark_disturbed", "prepare", "ready_view"]
