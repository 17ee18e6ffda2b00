"""Which widths are really faster on this device: `prune.round_to=auto`.

Time does not fall as smoothly with the width as MACs do: vector units and kernels like some widths better than others
(`benchmarks/widths.py` shows how much on this machine), and only the whole network shows what a layer counts for. So
copies of the network are cut in all the ways in question, and their training steps decide.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from morphtrain.cost.stopwatch import timed
from morphtrain.morph import ChannelGraph, Space, format_of_model
from morphtrain.world import agree

TIE = 0.03  # of the fastest time: how much repeated measurements of the same network differ
CLEARLY = 1.15  # times as long as the fastest in a single step: more than noise
ROUNDS, LAST_ROUNDS = 4, 8  # steps of each network, whose median counts: in the search, and to confirm its result

Kept = Mapping[Space, torch.Tensor]  # space -> mask (size,) of the channels that stay


class WidthProbe:
    """Times training steps on the device of the model, and says which of several cuts is the fastest.

    Args:
        batch_size: of the training steps that are to become fast.
        autocast: the context the network runs in.

    Attributes:
        spent_seconds: what all searches so far have taken.
    """

    def __init__(self, batch_size: int, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.batch_size = batch_size
        self.autocast = autocast
        self.spent_seconds = 0.0

    def fastest(self, graph: ChannelGraph, options: Sequence[Kept]) -> Kept:
        """The cut with the fastest training steps, put together from `options`.

        A layer is fast when both its sides suit it, so whole options are tried first. Then the spaces of one resolution
        after another, the highest first, take their widths from another option where that saves time. Of cuts that
        differ by no more than noise, the first is taken. In the end the result and the first option are timed once
        more, and the first option is taken unless the result is clearly faster: the shortest of many measured times is
        likely one that was measured too short.
        """
        start = time.perf_counter()
        chosen = self._search(graph, options)
        self.spent_seconds += time.perf_counter() - start
        return chosen

    def _search(self, graph: ChannelGraph, options: Sequence[Kept]) -> Kept:
        plain = options[0]
        best = self._first_of_the_fastest(graph, options)
        for spaces in by_resolution(graph):
            others = ({**best, **{space: option[space] for space in spaces}} for option in options)
            best = self._first_of_the_fastest(graph, [best, *others])
        if widths_of(best) == widths_of(plain):
            return plain
        found, before = self.timed([cut(graph, best), cut(graph, plain)], self._inputs(graph), LAST_ROUNDS)
        return best if found < (1 - TIE) * before else plain

    def _first_of_the_fastest(self, graph: ChannelGraph, options: Sequence[Kept]) -> Kept:
        different = list({widths_of(option): option for option in reversed(options)}.values())[::-1]
        if len(different) == 1:
            return different[0]
        seconds = self.timed([cut(graph, option) for option in different], self._inputs(graph), ROUNDS)
        within = (1 + TIE) * min(seconds)
        return next(option for option, spent in zip(different, seconds, strict=True) if spent <= within)

    def timed(self, networks: Sequence[nn.Module], inputs: Sequence[Any], rounds: int) -> list[float]:
        """Seconds of a step of each network, the median of `rounds`.

        The networks take turns, so that what slows the machine slows all of them. One that is clearly slower than
        another takes one step only.
        """
        seconds: list[list[float]] = [[] for _ in networks]
        turns = list(zip(networks, seconds, strict=True))
        device = next(networks[0].parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for network, _ in turns:
                self._step(network, inputs, device)  # the first one picks and compiles kernels
            for _ in range(rounds):
                for network, times in turns:
                    times.append(self._step(network, inputs, device))
                fastest = min(times[0] for _, times in turns)
                turns = [(network, times) for network, times in reversed(turns) if times[0] <= CLEARLY * fastest]
        return agree([statistics.median(times) for times in seconds])  # all processes cut alike

    def _step(self, network: nn.Module, inputs: Sequence[Any], device: torch.device) -> float:
        """Seconds of a forward and backward pass."""
        spent = timed(partial(self._backpropagate, network, inputs), device)
        network.zero_grad()
        return spent

    @torch.enable_grad()
    def _backpropagate(self, network: nn.Module, inputs: Sequence[Any]) -> None:
        with self.autocast():
            outputs = [leaf for leaf in tree_leaves(network(*inputs)) if getattr(leaf, "requires_grad", False)]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    def _inputs(self, graph: ChannelGraph) -> list[Any]:
        """A batch of noise in the shape of the graph's example."""
        example = graph.example_input if isinstance(graph.example_input, tuple) else (graph.example_input,)
        device, layout = next(graph.model.parameters()).device, format_of_model(graph.model)
        return [self._batch(x, device, layout) if isinstance(x, torch.Tensor) else x for x in example]

    def _batch(self, x: torch.Tensor, device: torch.device, layout: torch.memory_format) -> torch.Tensor:
        batch = torch.zeros(self.batch_size, *x.shape[1:], dtype=x.dtype, device=device)
        if x.is_floating_point():
            batch.normal_(generator=torch.Generator(device).manual_seed(0))
        return batch.to(memory_format=layout) if x.dim() == 4 else batch


def cut(graph: ChannelGraph, kept: Kept) -> nn.Module:
    """A copy of the graph's model with only the kept channels, in training mode."""
    twin = copy.deepcopy(graph)
    changes = zip(twin.spaces, (kept[space] for space in graph.spaces), strict=True)
    twin.reindex_spaces({space: mask.nonzero().flatten() for space, mask in changes if not mask.all()})
    return twin.model.train()


def widths_of(kept: Kept) -> tuple[int, ...]:
    """How many channels of each space are kept."""
    return tuple(int(mask.sum()) for mask in kept.values())


def by_resolution(graph: ChannelGraph) -> list[list[Space]]:
    """The spaces in groups of the same resolution, the highest first; where a space has several, its highest counts."""
    shapes = {call.path: (call.input_shape, call.output_shape) for call in graph.calls}
    groups: dict[int, list[Space]] = {}
    for space in graph.spaces:
        known = [shapes[slot.axis.path][slot.role != "consumes"] for slot in space.slots if slot.axis.path in shapes]
        groups.setdefault(max((math.prod(shape[2:]) for shape in known), default=1), []).append(space)
    return [groups[positions] for positions in sorted(groups, reverse=True)]
