"""How long reshaping ResNet-32 takes, optimizer state and tracing included, against one training step."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch.nn import functional as F

from morphtrain.grow.net2net import widen
from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph
from morphtrain.prune.reconfigure import reconfigure
from morphtrain.trainer.process import prepare_process

LIMIT = 0.15  # seconds
WIDENING_LIMIT = 0.3  # seconds; what the thesis names for its server


def main() -> None:
    prepare_process()
    dense = ResNet(blocks=5)
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    morphs, steps, widenings = [], [], []
    for _ in range(9):
        model = copy.deepcopy(dense)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        start = time.perf_counter()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - start)
        kill_every_third_channel(ChannelGraph.trace(model, images[:1]))
        start = time.perf_counter()
        change = reconfigure(ChannelGraph.trace(model, images[:1]), optimizer=optimizer)
        morphs.append(time.perf_counter() - start)
        assert len(change.widths) == 20
        widened = copy.deepcopy(dense)
        optimizer = torch.optim.SGD(widened.parameters(), lr=0.01, momentum=0.9)
        F.cross_entropy(widened(images[:8]), labels[:8]).backward()
        optimizer.step()
        start = time.perf_counter()
        assert len(widen(ChannelGraph.trace(widened, images[:1]), 2, noise=0.5, optimizer=optimizer)) == 20
        widenings.append(time.perf_counter() - start)
    seconds = statistics.median(morphs)
    print(
        f"reconfiguration: tracing and pruning all 20 spaces of ResNet-32 = {seconds:.4f} s, "
        f"{seconds / statistics.median(steps):.3f} of a training step of 128 images   "
        f"limit {LIMIT:.2f} s {'ok' if seconds <= LIMIT else 'EXCEEDED'}"
    )
    seconds = statistics.median(widenings)
    print(
        f"widening: tracing and doubling all 20 spaces of ResNet-32 = {seconds:.4f} s   "
        f"limit {WIDENING_LIMIT:.2f} s {'ok' if seconds <= WIDENING_LIMIT else 'EXCEEDED'}"
    )


@torch.no_grad()
def kill_every_third_channel(graph: ChannelGraph) -> None:
    for space in graph.spaces:
        for slot in space.slots:
            if slot.has_weights:
                name, dim = slot.axis.tensors[0]
                rows = torch.arange(slot.start, slot.start + space.size, 3)
                getattr(slot.axis.module, name).index_fill_(dim, rows, 0.0)


if __name__ == "__main__":
    main()
