"""The training loop, its clock and its checkpoints."""

from morphtrain.trainer.train import train

__all__ = ["train"]
