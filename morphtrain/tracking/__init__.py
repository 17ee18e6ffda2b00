"""Records of runs: one module per option of the `tracking` group. Only this package imports MLflow, and only when used.

A tracker has `start`, `update`, `artifact` and `finish`. The checkpoint, not the tracker, is the authoritative record:
each call passes the whole history, and the tracker sends what it has not sent yet, so a failed call loses nothing.
`begin_sweep` and `end_sweep` keep a sweep's own run, the parent of its trials' runs. `mark_disturbed` tags those
that count for nothing.
"""

from morphtrain.tracking.disturbed import mark_disturbed
from morphtrain.tracking.sweep_run import begin_sweep, end_sweep, prepare

__all__ = ["begin_sweep", "end_sweep", "mark_disturbed", "prepare"]
