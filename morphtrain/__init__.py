"""MorphTrain: which training-time methods make this CNN train faster on this machine, and what do they cost?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from morphtrain.schema import Config

__version__ = "0.1.0"


def load(path: str | Path, model: Callable[..., nn.Module] | None = None) -> nn.Module:
    """Rebuild the (morphed) network of a checkpoint from that file alone, on the CPU and in evaluation mode.

    A file never decides what is imported or which function is called. So a network of your own
    (`model._target_=my_package.Net`) has to be known already: import its package first, or pass what makes it. Either
    way it is called with the keywords in the file; with a file you do not trust, pass `model`.

    Args:
        path: a checkpoint, such as `last.pt` in a run directory.
        model: for a network of your own: its class, or a function that makes it, called with the keywords of the run
            (plus `num_classes` and `in_channels` if it takes them). None: the class that the checkpoint names, if its
            module has been imported; a function has to be passed.

    Raises:
        UserError: if the file is damaged or not a checkpoint of MorphTrain; if it holds a network of your own that is
            neither imported nor passed, or is not the one it was written with; if `model` is given for one of
            MorphTrain's networks.
    """
    from morphtrain.trainer.checkpoint import load_model

    return load_model(Path(path), model)


def compose(*overrides: str, config_dir: str | Path | None = None) -> Config:
    """The checked config that `python -m morphtrain.run` would run with these overrides.

        config = morphtrain.compose("prune=prunetrain", "optimizer.lr=0.05")

    Args:
        config_dir: directory with option files of your own, as `--config-dir`.

    Raises:
        UserError: for a wrong value, naming the key; Hydra raises its own errors for unknown options and keys.
    """
    from morphtrain import schema

    return schema.compose(*overrides, config_dir=config_dir)
