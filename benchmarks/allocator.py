"""What keeping freed memory gains (`trainer/process.py`): training steps with and without."""

from __future__ import annotations

import statistics
import subprocess
import sys

STEP = """
import statistics, sys, time, torch
from torch.nn import functional as F
from morphtrain.model import ResNet
from morphtrain.trainer.process import keep_freed_memory
torch.set_flush_denormal(True)
if sys.argv[1] == "keep":
    keep_freed_memory()
model, images, labels = ResNet(blocks=1), torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
seconds = []
for _ in range(25):
    start = time.perf_counter()
    F.cross_entropy(model(images), labels).backward()
    model.zero_grad()
    seconds.append(time.perf_counter() - start)
print(statistics.median(seconds[5:]))
"""


def main() -> None:
    def seconds(choice: str) -> float:
        return float(
            subprocess.run([sys.executable, "-c", STEP, choice], capture_output=True, text=True, check=True).stdout
        )

    ratios = [seconds("keep") / seconds("return") for _ in range(6)]
    print(
        f"allocator: keeping freed memory / returning it = {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs of processes)"
    )


if __name__ == "__main__":
    main()
