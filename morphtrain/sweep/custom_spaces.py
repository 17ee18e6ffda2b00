"""Search spaces in which some keys depend on the values of others; for `hydra.sweeper.custom_search_space`."""

from __future__ import annotations

from omegaconf import DictConfig
from optuna.trial import Trial


def everything(config: DictConfig, trial: Trial) -> None:
    """Search every group that can save time: pruning, growth, number format, batch size, norm and learning rate."""
    prune = trial.suggest_categorical("prune", ["none", "prunetrain", "morphnet"])
    if prune != "none":
        trial.suggest_float("prune.lasso_ratio", 1, 20, log=True)
        trial.suggest_int("prune.interval", 1, 10)
    if trial.suggest_categorical("grow", ["none", "wider", "deeper"]) != "none":
        trial.suggest_int("grow.patience", 2, 10)
    trial.suggest_int("model.width", 6, 16, step=2)
    trial.suggest_categorical("precision", ["o0", "bf16"])
    trial.suggest_categorical("norm", ["batch", "ghost"])
    trial.suggest_categorical("batch_policy", ["fixed", "adabatch"])
    trial.suggest_int("batch_policy.batch_size", 16, 128, step=16)
    trial.suggest_float("optimizer.lr", 0.02, 0.5, log=True)
