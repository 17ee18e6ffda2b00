"""MorphTrain: which training-time methods make this CNN train faster on this machine, and what do they cost?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def load(path: str | Path) -> nn.Module:
    """Rebuild the (morphed) network of a checkpoint from that file alone, on the CPU and in evaluation mode.

    Raises:
        UserError: if the file is damaged, or no checkpoint of MorphTrain.
    """
    from morphtrain.trainer.checkpoint import load_model

    return load_model(Path(path))
