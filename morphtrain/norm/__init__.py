"""Normalisation: one module per option of the `norm` group, applied to the model when it is built."""
