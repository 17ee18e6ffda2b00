"""The command: the largest batch that fits a memory budget, and the smallest that trains nearly as fast as any.

python -m morphtrain.maxbatch model=resnet32 data=cifar10 budget=11GiB
python -m morphtrain.maxbatch model=vgg16 input_shape=[3,64,64] num_classes=200 budget=8e9 device=cuda
"""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from morphtrain import interrupts, schema
from morphtrain.processes.place import is_follower
from morphtrain.run import past_hydra, through_hydra, with_messages


@hydra.main(config_path=str(schema.CONF), config_name="maxbatch")
def job(composed: DictConfig) -> int:
    """Print the answer, and return it to a sweeper."""
    settings = HydraConfig.get()
    with past_hydra(settings.mode), interrupts.at_once():
        config = schema.parse_max_batch(composed)
        choices = settings.runtime.choices
        # torch is slow to import; --help and --cfg do without it
        from morphtrain.trainer.max_batch_report import show_max_batch

        groups = ("model", "norm", "optimizer", "precision")
        return show_max_batch(config, [f"{group}={choices[group]}" for group in groups])


def main() -> None:
    """Run the command; of several processes the first one does."""
    with_messages(run)


def run() -> None:
    """Answer, in the first process."""
    if not is_follower():
        through_hydra("maxbatch", job)


if __name__ == "__main__":
    main()
