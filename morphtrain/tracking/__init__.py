"""Records of runs: one module an option of the `tracking` group. Only `tracking.mlflow` imports MLflow.

A tracker has `start`, `update`, `artifact` and `finish`. The checkpoint, not the tracker, is the record that counts: a
tracker is told the whole history each time and sends what it has not sent, so a lost call costs nothing.
"""
