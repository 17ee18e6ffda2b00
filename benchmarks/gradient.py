"""Step times of a dense ResNet-8 with each gradient method in every step, interleaved, as ratios to exact gradients.

    python gradient.py [WIDTH ...]     # 64 by default

Whole training steps (forward, backward, optimizer). What leaving out gradients of weights could save at most is their
share of the multiply-accumulates of a step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from interleaved import interleave, report
from torch import nn
from torch.nn import functional as F

from morphtrain.gradient import ApproximateGradients, SparseGradients
from morphtrain.layer_calls import CONVOLUTIONS, LayerCalls
from morphtrain.model import ResNet
from morphtrain.trainer.process import prepare_process

IMAGES, WIDTHS, BATCH, ROUNDS = (1, 28, 28), (64,), 32, 20
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EXACT = "exact"
METHODS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    EXACT: nullcontext,
    "zero": lambda: ApproximateGradients("zero"),
    "zero, every=1": lambda: ApproximateGradients("zero", every=1),
    "top1": lambda: ApproximateGradients("top1"),
    "random": lambda: ApproximateGradients("random"),
    "sparse_activation": lambda: SparseGradients(0.9),
}


class Shares(LayerCalls):
    """Counts the MACs of a step, and those of the weights' gradients of every second convolution and of all."""

    def __init__(self) -> None:
        super().__init__()
        self.all = 0
        self.weights: list[int] = []

    def call(
        self, layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any, **keywords: Any
    ) -> torch.Tensor:
        out: torch.Tensor = layer(x, weight, bias, *rest, **keywords)
        macs = out.numel() * math.prod(weight.shape[1:])
        self.all += macs * (2 + x.requires_grad)
        if layer in CONVOLUTIONS and max(weight.shape[2:]) > 1:
            self.weights.append(macs)
        return out


def network(width: int, memory_format: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = ResNet(blocks=1, width=width, in_channels=IMAGES[0]).to(memory_format=FORMATS[memory_format]).train()
    images = torch.randn(BATCH, *IMAGES).to(memory_format=FORMATS[memory_format])
    return model, images, torch.randint(10, (BATCH,))


def step(width: int, memory_format: str, method: str) -> Callable[[], None]:
    """A training step of a network of its own."""
    model, images, labels = network(width, memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def run() -> None:
        with METHODS[method]():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    prepare_process()
    for width in [int(word) for word in sys.argv[1:]] or WIDTHS:
        model, images, _ = network(width, "contiguous")
        with Shares() as shares:
            model(images)
        second, every = sum(shares.weights[1::2]) / shares.all, sum(shares.weights) / shares.all
        title = f"gradient: ResNet-8, width {width}, batch {BATCH}"
        print(f"{title}: at most, by MACs: zero {1 - second:.3f}, zero, every=1 {1 - every:.3f} of a step", flush=True)
        for memory_format in FORMATS:
            steps = {method: step(width, memory_format, method) for method in METHODS}
            where = f"{title}, {memory_format}, {torch.get_num_threads()} thread(s)"
            report(where, interleave(steps, ROUNDS), EXACT)


if __name__ == "__main__":
    main()
