"""Predicted peak memory of training steps against what the process really takes, before and after pruning.

A fresh process per network and batch size: it trains a copy at batch 2 first, so that kernels are loaded and compiled,
then notes how its resident size grows from before the network is there to the fullest moment of two steps. For the
comparison glibc gets every block from the system by itself and returns it at once: the resident size is then what the
tensors need, as an allocator without fragmentation would have it. `kept` is the same under the trainer's own setting
(`trainer/process.py`), which is faster and leaves holes in the heap. Linux only. First, the time an estimate takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from morphtrain.cost import max_batch
from morphtrain.model import ResNet

NETWORKS = ("resnet32", "vgg11", "mobilenet_v2")
BATCHES = (64, 128, 256)
FEWER = {"mobilenet_v2": (16, 32, 64)}  # 18 MiB a sample

MEASURE = """
import ctypes, gc, json, sys
import torch
from morphtrain.cost import estimate_memory
from morphtrain.cost.copies import MOMENTUM_SGD
from morphtrain.cost.step import training_step
from morphtrain.model import MobileNet, ResNet, VGG
from morphtrain.morph import ChannelGraph
from morphtrain.trainer.process import keep_freed_memory

name, batch, pruned, kept = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "pruned", sys.argv[4] == "kept"
M_MMAP_THRESHOLD = -3
if kept:
    keep_freed_memory()
else:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)

def network():
    networks = {"resnet32": lambda: ResNet(blocks=5), "vgg11": lambda: VGG(depth=11), "mobilenet_v2": MobileNet}
    model = networks[name]()
    if pruned:
        graph = ChannelGraph.trace(model, torch.zeros(1, 3, 32, 32))
        graph.reindex_spaces({space: range(max(1, space.size // 2)) for space in graph.spaces})
    return model

def steps(model, batch):
    optimizer = MOMENTUM_SGD(model.parameters())
    for _ in range(2):
        images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        training_step(model, optimizer, images, labels)

def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

steps(network(), 2)
predicted = estimate_memory(network(), (3, 32, 32), batch)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # forget the highest size so far
before = resident("VmRSS")
steps(network(), batch)
print(json.dumps({"predicted": predicted, "real": resident("VmHWM") - before}))
"""


def measure(name: str, batch: int, pruned: bool, kept: bool = False) -> dict[str, int]:
    """`predicted` and `real` bytes of training steps of `batch` 32x32 images, from a process of their own."""
    arguments = [name, str(batch), "pruned" if pruned else "dense", "kept" if kept else "returned"]
    result = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def report_seconds() -> None:
    """The largest network of the thesis's table, 120 convolutions, in a process that has estimated before."""

    def seconds(blocks: int) -> float:
        start = time.perf_counter()
        max_batch(ResNet(stages=4, blocks=blocks, layers=3, downsample=False), (3, 32, 32), 11 * 2**30)
        return time.perf_counter() - start

    first, worst = seconds(1), max(seconds(10) for _ in range(3))
    print(
        f"memory: largest batch of ResNet(4, 10), worst of 3 = {worst:.2f} s   "
        f"limit 2 s {'ok' if worst <= 2 else 'EXCEEDED'} (the first of a process, ResNet(4, 1): {first:.2f} s)"
    )


def main() -> None:
    report_seconds()
    for name in NETWORKS:
        for pruned in (False, True):
            for batch in FEWER.get(name, BATCHES):
                sizes = measure(name, batch, pruned)
                ratio = sizes["predicted"] / sizes["real"]
                kept = measure(name, batch, pruned, kept=True)["real"]
                print(
                    f"memory: {name}{', half its channels' if pruned else ''}, batch {batch}: predicted "
                    f"{sizes['predicted'] / 2**20:.1f} MiB, real {sizes['real'] / 2**20:.1f}; predicted / real = "
                    f"{ratio:.3f}   limits 0.95, 1.10 {'ok' if 0.95 <= ratio <= 1.1 else 'EXCEEDED'}; "
                    f"kept / real = {kept / sizes['real']:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
