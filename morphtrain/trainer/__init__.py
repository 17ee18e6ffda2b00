"""The training loop, its clock and its checkpoints. A run by hand:

run = new_run(morphtrain.compose("prune=prunetrain"))
start(run)
while run.epoch < run.config.epochs:
    begin_epoch(run)
    train_epoch(run)
    print(finish_epoch(run))
"""

from morphtrain.trainer.build import build_run
from morphtrain.trainer.epoch import begin_epoch, finish_epoch, start
from morphtrain.trainer.loop import train_epoch
from morphtrain.trainer.train import new_run, train

__all__ = ["begin_epoch", "build_run", "finish_epoch", "new_run", "start", "train", "train_epoch"]
