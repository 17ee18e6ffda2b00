"""Ghost batch norm against batch norm: forward and backward of 512x64x16x16, chunks of 32, interleaved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from interleaved import interleave, report
from torch import nn

from morphtrain.norm.ghost import GhostBatchNorm2d
from morphtrain.trainer.process import prepare_process

SHAPE, GHOST = (512, 64, 16, 16), 32


def step(norm: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    x = x.detach().requires_grad_()

    def run() -> None:
        norm(x).backward(grad)
        x.grad = None

    return run


def main() -> None:
    prepare_process()
    channels = SHAPE[1]
    norms = {"batch norm": nn.BatchNorm2d(channels), "ghost norm": GhostBatchNorm2d(channels, GHOST)}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, grad = (torch.randn(SHAPE).to(memory_format=memory_format) for _ in range(2))
        seconds = interleave({name: step(norm, x, grad) for name, norm in norms.items()}, rounds=100)
        title = f"ghost norm: {str(memory_format).removeprefix('torch.')}, {torch.get_num_threads()} thread(s)"
        report(title, seconds, "batch norm", limit=1.3)


if __name__ == "__main__":
    main()
