"""Shrinking a network while it trains: one module an option of the `prune` group."""
