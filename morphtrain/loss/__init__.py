"""Losses: one module an option of the `loss` group, each of which builds a `morphtrain.contracts.Loss`."""
