"""Records of runs: one module an option of the `tracking` group. Only this package imports MLflow, where it is needed.

A tracker has `start`, `update`, `artifact` and `finish`. The checkpoint, not the tracker, is the record that counts: a
tracker is told the whole history each time and sends what it has not sent, so a lost call costs nothing. `begin_sweep`
and `end_sweep` keep the run that the runs of a sweep have in common.
"""

from morphtrain.tracking.sweep_run import begin_sweep, end_sweep

__all__ = ["begin_sweep", "end_sweep"]
