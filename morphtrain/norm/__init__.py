"""Normalisation: one module an option of the `norm` group, applied to the model when it is built."""
