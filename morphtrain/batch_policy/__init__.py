"""Batch sizes over a run: one module an option of the `batch_policy` group."""
