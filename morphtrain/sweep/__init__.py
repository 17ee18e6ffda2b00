"""Sweeps: Hydra's Optuna sweeper with resumption, early stopping, a baseline and a closing table."""
