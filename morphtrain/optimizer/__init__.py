"""Optimizers: one module an option of the `optimizer` group."""
