"""Tracing a network and cutting every channel space in half: ours and torch-pruning's, side by side in one process."""

from __future__ import annotations

import copy
import time
import warnings

import torch
import torch_pruning
from interleaved import interleave, report
from torch import nn
from torchvision import models

from morphtrain.morph import ChannelGraph
from morphtrain.trainer.process import prepare_process

ROUNDS = 9


def ours(model: nn.Module, image: torch.Tensor) -> None:
    graph = ChannelGraph.trace(model, image)
    graph.reindex_spaces({space: range(space.size // 2) for space in graph.spaces})


def theirs(model: nn.Module, image: torch.Tensor) -> None:
    graph = torch_pruning.DependencyGraph().build_dependency(model, image)
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    for group in graph.get_all_groups(ignored_layers=classifier, root_module_types=[nn.Conv2d, nn.Linear]):
        width = len(group[0].idxs)
        group.prune(list(range(width // 2, width)))


def main() -> None:
    prepare_process()
    warnings.simplefilter("ignore")
    image = torch.randn(1, 3, 224, 224)
    for name in ("resnet50", "mobilenet_v2"):
        dense = models.get_model(name)
        copies = iter([copy.deepcopy(dense) for _ in range(2 * (ROUNDS + 2))])
        kept: dict[str, nn.Module] = {}

        def cut(how, name=name, copies=copies, kept=kept) -> None:
            kept[how.__name__] = next(copies)
            how(kept[how.__name__], image)

        seconds = interleave({"ours": lambda: cut(ours), "torch-pruning": lambda: cut(theirs)}, rounds=ROUNDS)
        shapes = [[p.shape for p in model.parameters()] for model in kept.values()]
        assert shapes[0] == shapes[1], "the two did not do the same"
        report(f"surgery: {name}", seconds, "torch-pruning", limit=1.0)
        start = time.perf_counter()
        ChannelGraph.trace(dense, image)
        print(f"surgery: {name} of which tracing = {time.perf_counter() - start:.3f} s")


if __name__ == "__main__":
    main()
