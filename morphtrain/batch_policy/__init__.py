"""Batch sizes over a run: one module per option of the `batch_policy` group."""
