"""What the regularisers cost in a training step: ResNet-32, batch 128, 32x32, with and without, interleaved."""

from __future__ import annotations

import torch
from interleaved import interleave, report
from torch.nn import functional as F

from morphtrain.cost import WidthCost
from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph
from morphtrain.prune.channel_norms import ChannelNorms
from morphtrain.prune.lasso import add_gradient, group_lassos, shrink
from morphtrain.trainer.process import prepare_process


def main() -> None:
    prepare_process()
    model = ResNet(blocks=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    graph = ChannelGraph.trace(model, images[:1])
    lassos = group_lassos(graph)
    norms = ChannelNorms(graph, "gamma_l1")
    slopes = norms.per_channel(WidthCost(graph, "flops").coefficients(norms.alive(1e-2)))

    def step(update: str = "off") -> None:
        F.cross_entropy(model(images), labels).backward()
        if update == "subgradient":
            add_gradient(lassos, 1e-6)
        if update == "as a loss term":
            (1e-6 * autograd_penalty()).backward()
        optimizer.step()
        if update == "proximal":
            shrink(lassos, 1e-7)
        if update == "morphnet":
            norms.shrink(1e-14 * slopes)
        optimizer.zero_grad()

    def autograd_penalty() -> torch.Tensor:
        """How it is usually written: a term of the loss, differentiated with the rest."""
        total = torch.zeros(())
        for lasso in lassos:
            w = lasso.weight
            total = total + w.square().flatten(1).sum(1).add(1e-8).sqrt().sum()
            total = total + w.square().transpose(0, 1).flatten(1).sum(1).add(1e-8).sqrt().sum()
        return total

    variants = ("off", "proximal", "subgradient", "morphnet", "as a loss term")
    seconds = interleave({name: lambda name=name: step(name) for name in variants}, rounds=32)
    for name in ("proximal", "subgradient", "morphnet"):
        report("regulariser", {"off": seconds["off"], name: seconds[name]}, "off", limit=1.03)
    report("for comparison", {"off": seconds["off"], "as a loss term": seconds["as a loss term"]}, "off")
    # The difference of two noisy steps is noisier than what it shows: also clock the regulariser alone, between steps.
    regularisers = {
        "proximal alone": lambda: shrink(lassos, 1e-7),
        "morphnet alone": lambda: norms.shrink(1e-14 * slopes),
    }
    alone = interleave({"step": step, **regularisers}, rounds=14)
    report("regulariser", alone, "step", limit=0.03)


if __name__ == "__main__":
    main()
