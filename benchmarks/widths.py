"""How much time halving the MACs of ResNet-20 saves, and what `prune.round_to=auto` and `prune.round_down` add.

    python widths.py [contiguous|channels_last]     # one format instead of both

Which channels go is decided in three ways: "lasso", those that die when a network trains under the proximal lasso on
synthetic images; "spared", the same except for the stage at full resolution, which is ignored; and "evenly", the same
share of every space, at random. Then training steps of the dense network alternate with those of the network cut to
what is alive, which has half the MACs, of the one whose widths the probe chose ("rounded"), and of the one that also
gave up weak live channels ("lowered", `round_down=0.5`); batch 64, 32x32. Speed-ups compare with the dense network of
the same format; each network has its own MAC reduction.
"""

from __future__ import annotations

import copy
import statistics
import sys
from functools import partial

import torch
from interleaved import interleave
from torch import nn
from torch.nn import functional as F

from morphtrain import schema
from morphtrain.cost import WidthCost, count_macs
from morphtrain.data import synthetic
from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph
from morphtrain.prune.lasso import group_lassos, penalty, penalty_weight_for_ratio, shrink
from morphtrain.prune.reconfigure import reconfigure
from morphtrain.prune.rounding import NO_ROUNDING, Rounding
from morphtrain.prune.width_probe import WidthProbe
from morphtrain.trainer.build import FORMATS
from morphtrain.trainer.process import prepare_process

BATCH, SHAPE = 64, (3, 32, 32)
IMAGES, LABELS = torch.randn(BATCH, *SHAPE), torch.randint(10, (BATCH,))
DATA = synthetic.build(schema.data.Synthetic("synthetic", 2048, 512, 32, 3, 10, 4.0))
ROUND_DOWN = 0.5
ROUNDS = 10
WAYS = ("rounded", "lowered")


def dense(width: int, seed: int, memory_format: torch.memory_format) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(blocks=3, width=width).to(memory_format=memory_format)


def graph_of(model: nn.Module, chosen: str) -> ChannelGraph:
    return ChannelGraph.trace(model, IMAGES[:1], ["stem", "stages.0"] if chosen == "spared" else [])


def cut_to(model: nn.Module, chosen: str, rounding: Rounding = NO_ROUNDING) -> nn.Module:
    """A copy of the network, reconfigured to such widths."""
    twin = copy.deepcopy(model)
    reconfigure(graph_of(twin, chosen), rounding=rounding)
    return twin


def dead_by_lasso(width: int, seed: int, memory_format: torch.memory_format, chosen: str) -> nn.Module:
    """A network of its full shape; without what is dead it has half its MACs."""
    model = dense(width, seed, memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    lassos = group_lassos(graph_of(model, chosen))
    penalty_weight = penalty_weight_for_ratio(0.95, 2.3, penalty(lassos).item())
    half, steps = count_macs(model, SHAPE) / 2, 0
    while True:
        for images, labels in DATA.train_batches(32, torch.Generator().manual_seed(steps)):
            F.cross_entropy(model(images.contiguous(memory_format=memory_format)), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            shrink(lassos, 0.1 * penalty_weight / (1 - 0.9))
            steps += 1
            if steps % 10 == 0 and count_macs(cut_to(model, chosen), SHAPE) <= half:
                return model


@torch.no_grad()
def dead_evenly(width: int, seed: int, memory_format: torch.memory_format, chosen: str) -> nn.Module:
    """A network of its full shape; without the dead channels, the same share of every space, it has half its MACs."""
    model = dense(width, seed, memory_format)
    graph = graph_of(model, chosen)
    cost = WidthCost(graph, "flops")
    shares = (share / 1000 for share in range(1000, 0, -1))
    widths = ({space: round(share * space.size) for space in graph.spaces} for share in shares)
    half = next(alive for alive in widths if cost(alive) <= cost() / 2)
    for space, alive in half.items():
        dead = torch.randperm(space.size)[alive:]
        for slot in space.slots:
            if slot.has_weights:
                slot.axis.weight.index_fill_(slot.axis.dim, slot.start + dead, 0.0)
    return model


DEAD = {"lasso": dead_by_lasso, "spared": dead_by_lasso, "evenly": dead_evenly}


def step(model: nn.Module, images: torch.Tensor) -> None:
    F.cross_entropy(model(images), LABELS).backward()
    model.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On images that were not trained on, by the batch's own statistics."""
    batches = list(DATA.val_batches())
    right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def compare(title: str, chosen: str, width: int, seed: int, name: str, probe: WidthProbe) -> dict[str, float]:
    """Time what was cut in all ways against the dense network, and against a second copy of the plainly cut one."""
    memory_format = FORMATS[name]
    model = DEAD[chosen](width, seed, memory_format, chosen)
    networks = {
        "dense": dense(width, seed, memory_format),
        "cut": cut_to(model, chosen),
        "rounded": cut_to(model, chosen, Rounding(probe=probe)),
        "lowered": cut_to(model, chosen, Rounding(probe=probe, round_down=ROUND_DOWN)),
        "cut again": cut_to(model, chosen),
    }
    images = IMAGES.contiguous(memory_format=memory_format)
    seconds = interleave({kind: partial(step, network, images) for kind, network in networks.items()}, rounds=ROUNDS)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    sizes = {kind: [space.size for space in ChannelGraph.trace(m, IMAGES[:1]).spaces] for kind, m in networks.items()}
    results = {f"{kind} / cut": ratio(kind, "cut") for kind in WAYS}
    same = [kind for kind in ("cut again", *WAYS) if sizes[kind] == sizes["cut"]]  # apart from their place in memory
    results["noise"] = max(abs(ratio(kind, "cut") - 1) for kind in same)
    for kind in ("cut", *WAYS):
        fewer = count_macs(networks["dense"], SHAPE) / count_macs(networks[kind], SHAPE)
        faster = ratio("dense", kind)
        results[kind] = faster / fewer
        print(
            f"{title}: seed {seed}, {kind}: {fewer:.2f} x fewer MACs, {faster:.2f} x faster ({faster / fewer:.3f}), "
            f"validation accuracy {accuracy(networks[kind]):.3f}; {sizes[kind]}",
            flush=True,
        )
    return results


def layer(channels: int, memory_format: torch.memory_format) -> nn.Module:
    """A 3x3 convolution with norm and activation."""
    parts = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    return nn.Sequential(*parts).to(memory_format=memory_format)


def where_the_time_goes(name: str) -> None:
    """Layers of the stages by width: even alone they do not take their MACs' share of the time."""
    for stage in range(3):
        top, side = 16 * 2**stage, SHAPE[1] // 2**stage
        steps = {}
        for width in range(top // 4, top + 1, top // 8):
            x = torch.randn(BATCH, width, side, side).to(memory_format=FORMATS[name]).requires_grad_()
            steps[width] = partial(backpropagate, layer(width, FORMATS[name]), x)
        seconds = interleave(steps, rounds=ROUNDS)
        ratios = (
            f"{width}: {statistics.median(a / b for a, b in zip(spent, seconds[top], strict=True)):.2f} "
            f"({(width / top) ** 2:.2f})"
            for width, spent in seconds.items()
        )
        print(f"widths: {name}: time of a layer at {side}x{side} over that of {top} channels (its MACs): ", end="")
        print(", ".join(ratios), flush=True)


def backpropagate(module: nn.Module, x: torch.Tensor) -> None:
    y = module(x)
    y.backward(torch.ones_like(y))


def summarise(title: str, column: dict[str, list[float]]) -> None:
    noise, networks = max(column["noise"]), len(column["noise"])
    for kind in WAYS:
        worst, middle = max(column[f"{kind} / cut"]), statistics.median(column[kind])
        print(
            f"{title}: {kind} / cut, worst of {networks} = {worst:.3f} (equal networks differ by up to "
            f"{noise:.3f})   limit {1 + noise:.3f} {'ok' if worst <= 1 + noise else 'EXCEEDED'}"
        )
        print(
            f"{title}: {kind}: speed-up / MAC reduction, median of {networks} = {middle:.3f} "
            f"(cut {statistics.median(column['cut']):.3f})   at least 0.75 {'ok' if middle >= 0.75 else 'MISSED'}",
            flush=True,
        )


def main() -> None:
    prepare_process()
    for name in sys.argv[1:] or FORMATS:
        where_the_time_goes(name)
        probe = WidthProbe(BATCH)
        for chosen, width, networks in (("lasso", 16, 3), ("spared", 16, 3), ("evenly", 16, 1)):
            title = f"widths: {name}: {chosen}, width {width}"
            results = [compare(title, chosen, width, seed, name, probe) for seed in range(1, networks + 1)]
            summarise(title, {key: [result[key] for result in results] for key in results[0]})


if __name__ == "__main__":
    main()
