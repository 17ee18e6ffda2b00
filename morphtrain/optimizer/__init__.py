"""Optimizers: one module per option of the `optimizer` group."""
