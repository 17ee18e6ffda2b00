"""What half the MACs of ResNet-20 are worth in time, in both memory formats, and what `prune.round_to=auto` adds.

The channels that go are chosen in two ways: "evenly", the same share of every space, at random; and "lasso", those that
are dead when a network trained under the proximal lasso on synthetic images could lose half its MACs. Then training
steps of the dense network, of the one cut to what is alive and of the one whose widths the probe chose alternate, in
both formats; batch 64, 32x32. Speed-ups are over the dense network of the same format, and MAC reductions those of each
network as it is, unless a line says otherwise.
"""

from __future__ import annotations

import copy
import statistics
import time
from functools import partial

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
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NETWORKS, ROUNDS = 2, 8


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


def step(model: nn.Module, images: torch.Tensor) -> None:
    F.cross_entropy(model(images), LABELS).backward()
    model.zero_grad()


def compare(chosen: str, width: int, seed: int, probes: dict[str, WidthProbe]) -> dict[str, dict[str, float]]:
    """Cut one network in both ways and formats, time them against the dense one and a second copy of the cut one."""
    model, networks, probing = CHOICES[chosen](width, seed), {}, {}
    for name, memory_format in FORMATS.items():
        dense, cut = ResNet(blocks=3, width=width), copy.deepcopy(model)
        rounded = copy.deepcopy(model).to(memory_format=memory_format)
        reconfigure(ChannelGraph.trace(cut, IMAGES[:1]))
        start = time.perf_counter()
        reconfigure(ChannelGraph.trace(rounded, IMAGES[:1]), round_to=probes[name])
        probing[name] = time.perf_counter() - start
        variants = {"dense": dense, "cut": cut, "rounded": rounded, "cut again": copy.deepcopy(cut)}
        networks |= {(name, kind): m.to(memory_format=memory_format) for kind, m in variants.items()}
    images = {name: IMAGES.to(memory_format=memory_format) for name, memory_format in FORMATS.items()}
    steps = {" ".join(key): partial(step, m, images[key[0]]) for key, m in networks.items()}
    seconds = interleave(steps, rounds=ROUNDS)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    macs = {key: count_macs(m, SHAPE) for key, m in networks.items()}
    results = {}
    for name, other in zip(FORMATS, reversed(FORMATS), strict=True):
        fewer = {kind: macs[name, "dense"] / macs[name, kind] for kind in ("cut", "rounded")}
        faster = {kind: ratio(f"{name} dense", f"{name} {kind}") for kind in ("cut", "rounded")}
        for kind in ("cut", "rounded"):
            sizes = [space.size for space in ChannelGraph.trace(networks[name, kind], IMAGES[:1]).spaces]
            what = f"{fewer[kind]:.2f} x fewer MACs, {faster[kind]:.2f} x faster"
            print(f"widths: {chosen}, {width}/{seed} {name} {kind}: {what}; {sizes}")
        results[name] = {
            "rounded / cut": ratio(f"{name} rounded", f"{name} cut"),
            "noise": abs(ratio(f"{name} cut again", f"{name} cut") - 1),
            "rounded": faster["rounded"] / fewer["rounded"],
            "cut": faster["cut"] / fewer["cut"],
            "of cut MACs": faster["rounded"] / fewer["cut"],
            "over the other": ratio(f"{other} dense", f"{name} rounded") / fewer["rounded"],
            "dense": ratio(f"{other} dense", f"{name} dense"),
            "probing": probing[name],
        }
    return results


CHOICES = {"evenly": half_dead_evenly, "lasso": half_dead}


def where_the_time_goes(channels_last: bool) -> None:
    """A 3x3 convolution, norm and activation of the stages by width, and the share of the first stage in the whole."""
    probe, name = WidthProbe(batch_size=BATCH), "channels_last" if channels_last else "contiguous"
    for stage in range(3):
        top, size = 16 * 2**stage, tuple(side // 2**stage for side in SHAPE[1:])
        geometry = ((3, 3), (1, 1), (1, 1), (1, 1), False, size, channels_last)
        layers = {width: Layer("cpu", BATCH, width, width, *geometry) for width in range(top // 4, top + 1, top // 8)}
        probe.measure(layers.values())
        full = probe.seconds[layers[top]]
        ratios = ", ".join(
            f"{w}: {probe.seconds[layer] / full:.2f} ({(w / top) ** 2:.2f})" for w, layer in layers.items()
        )
        print(
            f"widths: {name}: time of a layer at {size[0]}x{size[1]} over that of {top} channels (its MACs): {ratios}"
        )
    graph = ChannelGraph.trace(ResNet(blocks=3).to(memory_format=FORMATS[name]), IMAGES[:1])
    sizes = {space: space.size for space in graph.spaces}
    dense = [place.at(sizes, "cpu", BATCH) for place in timed_places(graph)]
    probe.measure(dense)
    first = sum(probe.seconds[layer] for layer in dense if layer.size == SHAPE[1:])
    share = first / sum(probe.seconds[layer] for layer in dense)
    print(f"widths: {name}: layers at {SHAPE[1]}x{SHAPE[2]} take {share:.2f} of the time of all layers of ResNet-20")


def summarise(title: str, column: dict[str, list[float]]) -> None:
    worst, noise, middle = (
        max(column["rounded / cut"]),
        max(column["noise"]),
        {key: statistics.median(values) for key, values in column.items()},
    )
    print(
        f"{title}: rounded / cut, worst of {NETWORKS} = {worst:.3f} (a network against its own copy differs by up to "
        f"{noise:.3f}; probing takes {max(column['probing']):.1f} s)   "
        f"limit {1 + noise:.3f} {'ok' if worst <= 1 + noise else 'EXCEEDED'}"
    )
    print(
        f"{title}: speed-up / MAC reduction, median = {middle['rounded']:.3f} (not rounded {middle['cut']:.3f}; over "
        f"the MACs before rounding {middle['of cut MACs']:.3f}; against the dense network of the other format "
        f"{middle['over the other']:.3f}, which takes {middle['dense']:.2f} of this one's time)   "
        f"at least 0.75 {'ok' if middle['rounded'] >= 0.75 else 'MISSED'}"
    )


def main() -> None:
    prepare_process()
    for channels_last in (False, True):
        where_the_time_goes(channels_last)
    probes = {(name, width): WidthProbe(batch_size=BATCH) for name in FORMATS for width in (16, 32)}
    for chosen, width in (("evenly", 16), ("lasso", 16), ("evenly", 32)):
        mine = {name: probes[name, width] for name in FORMATS}
        results = [compare(chosen, width, seed, mine) for seed in range(1, NETWORKS + 1)]
        for name in FORMATS:
            column = {key: [result[name][key] for result in results] for key in results[0][name]}
            summarise(f"widths: {chosen}, width {width}, {name}", column)


if __name__ == "__main__":
    main()
