"""Step times of a dense ResNet-8 by memory format, precision, compiling and fused optimizer, interleaved.

    python formats.py [WIDTH ...]     # 16 and 64 by default

The ratios are those of whole training steps (forward, backward, optimizer) to the default's: contiguous, 32 bits.
Compiling is timed with nothing in torch's cache.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from interleaved import interleave, report
from torch.nn import functional as F

from morphtrain.compilation import compiled
from morphtrain.model import ResNet
from morphtrain.optimizer.fused import fused
from morphtrain.trainer.process import prepare_process

IMAGES, WIDTHS, BATCHES, ROUNDS = (1, 28, 28), (16, 64), (32, 128), 40
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = {"o0": torch.float32, "bf16": torch.bfloat16}
DEFAULT = "contiguous o0"


def step(width: int, batch: int, variant: str) -> Callable[[], None]:
    """A training step of a network of its own."""
    layout, precision, *more = variant.split()
    torch.manual_seed(0)
    model = ResNet(blocks=1, width=width, in_channels=IMAGES[0]).to(memory_format=FORMATS[layout]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    if "fused" in more:
        fused(optimizer)
    forward: Callable[[torch.Tensor], torch.Tensor] = compiled(model, "default") if "compiled" in more else model
    images = torch.randn(batch, *IMAGES).to(memory_format=FORMATS[layout])
    labels = torch.randint(10, (batch,))
    dtype = PRECISIONS[precision]

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def variants() -> list[str]:
    pairs = [f"{layout} {precision}" for precision in PRECISIONS for layout in FORMATS]
    best = pairs[-1]
    return [*pairs, f"{DEFAULT} compiled", f"{best} compiled", f"{DEFAULT} fused", f"{best} fused"]


def main() -> None:
    prepare_process()
    from torch._inductor import config

    config.force_disable_caches = True
    for width in [int(word) for word in sys.argv[1:]] or WIDTHS:
        for batch in BATCHES:
            steps = {variant: step(width, batch, variant) for variant in variants()}
            title = f"ResNet-8, width {width}, batch {batch}, {torch.get_num_threads()} thread(s)"
            for name, run in steps.items():
                if name.endswith("compiled"):
                    start = time.perf_counter()
                    run()
                    print(f"{title}: {name}: the first step takes {time.perf_counter() - start:.1f} s", flush=True)
            report(title, interleave(steps, ROUNDS), DEFAULT)


if __name__ == "__main__":
    main()
