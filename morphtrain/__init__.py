"""MorphTrain: which training-time methods make this CNN train faster on this machine, and what do they cost?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from morphtrain.preprocessing import Preprocessing
    from morphtrain.schema import Config

__version__ = "0.1.0"


def load(path: str | Path, model: nn.Module | Callable[..., nn.Module] | None = None, raw: bool = False) -> nn.Module:
    """Rebuild the (morphed) network of a run's checkpoint or of a file of `save`, on the CPU and in evaluation mode.

    A file never decides what is imported or which function is called. So a network of your own
    (`model._target_=my_package.Net`) has to be known already: import its package first, or pass it, or what makes it.
    With a file you do not trust, pass it.

    Args:
        path: a checkpoint, such as `last.pt` or `best.pt` in a run directory, or a file of `save`.
        model: for a network of your own: its class or a function that makes it, called with the keywords of the run
            (plus `num_classes` and `in_channels` if it takes them); or the network as it was before it was pruned,
            which is changed in place. None: the class that the checkpoint names, if its module has been imported.
            A file of `save` names none and has no keywords.
        raw: the weights as trained, of a run with `ema`, in the place of their averages.

    Raises:
        UserError: if the file is damaged or not a checkpoint of MorphTrain; if it holds a network of your own that is
            neither imported nor passed, or is not the one it was written with; if `model` is given for one of
            MorphTrain's networks; with `raw`, if the file has no averages.
    """
    from morphtrain.trainer import networks

    return networks.load(networks.read(Path(path)), model, raw)


def load_preprocessing(path: str | Path) -> Preprocessing:
    """How images become inputs of the network that `load(path)` gives, and what its outputs stand for.

    What the data set did not say is None.

    Raises:
        UserError: if the file is damaged or not a checkpoint of MorphTrain.
    """
    from morphtrain.trainer import networks

    return networks.read(Path(path)).preprocessing()


def save(model: nn.Module, path: str | Path, preprocessing: Preprocessing | None = None) -> None:
    """Write a network that was pruned or grown in a loop of your own, for `load(path, model=...)`.

        morphtrain.save(model, "pruned.pt")
        model = morphtrain.load("pruned.pt", model=Net(width=32))   # as it was before it was pruned

    Structure, values, number and memory formats are kept; code is not, as in a run's checkpoint. A network that `load`
    gave of a run's checkpoint is loaded again as that one is. The file is written whole or not at all.

    Args:
        preprocessing: what `load_preprocessing` is to give; `morphtrain.export` needs its `input_shape`. None: that of
            the run's checkpoint, if there is one.

    Raises:
        UserError: if the network's `state_dict` holds what no file gives back, or the directory is missing.
        OSError: if `path` cannot be written.
    """
    from morphtrain.trainer import networks

    networks.save(model, Path(path), preprocessing)


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
