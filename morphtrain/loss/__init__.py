"""Losses: one module per option of the `loss` group, which builds a `morphtrain.contracts.Loss`."""
