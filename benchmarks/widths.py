"""What half the MACs of ResNet-20 are worth in time, and what `prune.round_to=auto` adds.

The channels that go are chosen in two ways: "evenly", the same share of every space, at random; and "lasso", those that
are dead when a network trained under the proximal lasso on synthetic images could lose half its MACs. Then training
steps of the dense network, of the one cut to what is alive and of the one whose widths the probe chose alternate; batch
64, 32x32.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time

import torch
from interleaved import interleave
from torch import nn
from torch.nn import functional as F

from morphtrain import schema
from morphtrain.cost import count_macs
from morphtrain.data import synthetic
from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph, WidthCost
from morphtrain.prune.lasso import group_lassos, penalty, shrink, strength_for_ratio
from morphtrain.prune.reconfigure import reconfigure
from morphtrain.prune.widths import Layer, WidthProbe, timed_places
from morphtrain.trainer.process import prepare_process

BATCH, SHAPE = 64, (3, 32, 32)
IMAGES, LABELS = torch.randn(BATCH, *SHAPE), torch.randint(10, (BATCH,))
NETWORKS, ROUNDS = 3, 12


def half_dead(width: int, seed: int) -> nn.Module:
    """A ResNet-20 of its full shape, half of whose MACs dead channels would take along."""
    torch.manual_seed(seed)
    model = ResNet(blocks=3, width=width)
    data = synthetic.build(schema.Synthetic("synthetic", 2048, 1, 32, 3, 10, 4.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    lassos = group_lassos(ChannelGraph.trace(model, IMAGES[:1]))
    strength = strength_for_ratio(0.95, 2.3, penalty(lassos).item())
    half, steps = count_macs(model, SHAPE) / 2, 0
    while True:
        for images, labels in data.train_batches(32, torch.Generator().manual_seed(steps)):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            shrink(lassos, 0.1 * strength / (1 - 0.9))
            steps += 1
            if steps % 10 == 0:
                cut = copy.deepcopy(model)
                reconfigure(ChannelGraph.trace(cut, IMAGES[:1]))
                if count_macs(cut, SHAPE) <= half:
                    return model


@torch.no_grad()
def half_dead_evenly(width: int, seed: int) -> nn.Module:
    """A ResNet-20 of its full shape; dead channels, the same share of every space, would take half the MACs along."""
    torch.manual_seed(seed)
    model = ResNet(blocks=3, width=width)
    graph = ChannelGraph.trace(model, IMAGES[:1])
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


def step(model: nn.Module) -> None:
    F.cross_entropy(model(IMAGES), LABELS).backward()
    model.zero_grad()


def compare(chosen: str, width: int, seed: int) -> dict[str, float]:
    """Cut one network in both ways, time them against the dense one and against a second copy of the cut one."""
    dense, model = ResNet(blocks=3, width=width), CHOICES[chosen](width, seed)
    cut, rounded = copy.deepcopy(model), copy.deepcopy(model)
    reconfigure(ChannelGraph.trace(cut, IMAGES[:1]))
    start = time.perf_counter()
    reconfigure(ChannelGraph.trace(rounded, IMAGES[:1]), round_to=WidthProbe(batch_size=BATCH))
    probing = time.perf_counter() - start
    networks = {"dense": dense, "cut": cut, "rounded": rounded, "cut again": copy.deepcopy(cut)}
    seconds = interleave({name: lambda m=m: step(m) for name, m in networks.items()}, rounds=ROUNDS)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    fewer = {name: count_macs(dense, SHAPE) / count_macs(m, SHAPE) for name, m in networks.items()}
    faster = {name: ratio("dense", name) for name in networks}
    for name, m in (("cut", cut), ("rounded", rounded)):
        spaces = [space.size for space in ChannelGraph.trace(m, IMAGES[:1]).spaces]
        what = f"{fewer[name]:.2f} x fewer MACs, {faster[name]:.2f} x faster"
        print(f"widths: {chosen}, {width}/{seed} {name}: {what}; {spaces}")
    return {
        "rounded / cut": ratio("rounded", "cut"),
        "noise": abs(ratio("cut again", "cut") - 1),
        "efficiency": faster["rounded"] / fewer["rounded"],
        "of cut": faster["cut"] / fewer["cut"],
        "probing": probing,
    }


CHOICES = {"evenly": half_dead_evenly, "lasso": half_dead}


def where_the_time_goes() -> None:
    """A 3x3 convolution, norm and activation of the first stage by width, and that stage's share of the network."""
    probe = WidthProbe(batch_size=BATCH)
    layers = {
        w: Layer("cpu", BATCH, w, w, (3, 3), (1, 1), (1, 1), (1, 1), False, SHAPE[1:], False) for w in range(4, 17, 2)
    }
    probe.measure(layers.values())
    full = probe.seconds[layers[16]]
    ratios = ", ".join(f"{width}: {probe.seconds[layer] / full:.2f}" for width, layer in layers.items())
    print(f"widths: time of the first stage's layer by width, over that of 16 channels ({1e3 * full:.1f} ms): {ratios}")
    graph = ChannelGraph.trace(ResNet(blocks=3), IMAGES[:1])
    sizes = {space: space.size for space in graph.spaces}
    dense = [place.at(sizes, "cpu", BATCH) for place in timed_places(graph)]
    probe.measure(dense)
    first = sum(probe.seconds[layer] for layer in dense if layer.size == SHAPE[1:])
    share = first / sum(probe.seconds[layer] for layer in dense)
    print(f"widths: layers at {SHAPE[1]}x{SHAPE[2]} take {share:.2f} of the time of all layers of ResNet-20")


def main() -> None:
    prepare_process()
    where_the_time_goes()
    for chosen, width in itertools.product(CHOICES, (16, 32)):
        results = [compare(chosen, width, seed) for seed in range(1, NETWORKS + 1)]
        column = {key: [result[key] for result in results] for key in results[0]}
        worst, noise = max(column["rounded / cut"]), max(column["noise"])
        efficiency = statistics.median(column["efficiency"])
        print(
            f"widths: {chosen}, width {width}: rounded / cut, worst of {NETWORKS} = {worst:.3f} (a network against its "
            f"own copy differs by up to {noise:.3f}; probing takes {max(column['probing']):.1f} s)   "
            f"limit {1 + noise:.3f} {'ok' if worst <= 1 + noise else 'EXCEEDED'}"
        )
        print(
            f"widths: {chosen}, width {width}: speed-up / MAC reduction, median = {efficiency:.3f} "
            f"(not rounded {statistics.median(column['of cut']):.3f})   "
            f"at least 0.75 {'ok' if efficiency >= 0.75 else 'MISSED'}"
        )


if __name__ == "__main__":
    main()
