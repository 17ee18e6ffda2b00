"""Our training loop against a bare one written by hand: the same network, images and optimizer, interleaved."""

from __future__ import annotations

import copy

import torch
from interleaved import interleave, report
from torch.nn import functional as F

import morphtrain
from morphtrain.trainer.build import build_run
from morphtrain.trainer.loop import train_epoch
from morphtrain.trainer.process import prepare_process

OVERRIDES = ["data=synthetic", "data.train_samples=640", "schedule.warmup_epochs=0"]


def main() -> None:
    prepare_process()
    config = morphtrain.compose(*OVERRIDES)
    run = build_run(config)
    run.batch_size = config.batch_policy.batch_size
    model = copy.deepcopy(run.model).train()
    sgd = config.optimizer
    optimizer = torch.optim.SGD(
        model.parameters(), lr=sgd.lr, momentum=sgd.momentum, nesterov=True, weight_decay=sgd.weight_decay
    )
    images, labels = run.data.train.pixels, run.data.train.labels

    def ours() -> None:
        run.epoch, run.progress = 1, 0.0
        train_epoch(run)

    def bare() -> None:
        order = torch.randperm(len(labels))
        for i in range(0, len(order), run.batch_size):
            rows = order[i : i + run.batch_size]
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()

    report("training loop", interleave({"ours": ours, "bare": bare}, rounds=20), "bare", limit=1.03)


if __name__ == "__main__":
    main()
