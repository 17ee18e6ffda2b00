"""Which widths are really faster on this device: `prune.round_to=auto`.

Time does not fall as smoothly with the width as MACs do: vector units and kernels like some widths better than others
(`benchmarks/widths.py` shows how much on this machine), and what a layer counts for shows in the whole network alone.
So copies of the network are cut in all the ways in question, and training steps of theirs decide.
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

MULTIPLES = (4, 8, 16)
TIE = 0.03  # of the fastest time: what repeated measurements of the same network differ by
CLEARLY = 1.15  # slower than the fastest in a single step: more than noise
ROUNDS, LAST_ROUNDS = 4, 8  # steps of each network, of which the median counts: while searching, and for the last word

Kept = Mapping[Space, torch.Tensor]  # space -> mask (size,) of the channels that stay


class WidthProbe:
    """Times training steps on the device of the model, and says which of several cuts is the fastest.

    Args:
        batch_size: of the training steps that are to become fast.
        autocast: the context the network runs in.
    """

    def __init__(self, batch_size: int, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.batch_size = batch_size
        self.autocast = autocast
        self.spent_seconds = 0.0  # on this

    def fastest(self, graph: ChannelGraph, options: Sequence[Kept]) -> Kept:
        """The cut with the fastest training steps, put together from `options`.

        A layer is fast when both its sides suit it, so whole options are tried first. Then the spaces of one resolution
        after those of another, the largest first, change to those of another option as long as that saves time. Of cuts
        that are equal but for noise the one that stands first counts; and the first option of all, if what was found
        saves no more than noise over it, timed once more: of many measured times the shortest is likely one that was
        measured too short.
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
        """Seconds of a step of each network, the median of some in turns: what slows the machine slows all of them.

        Of those that are clearly slower than another, one step tells enough.
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
        """A batch like the graph's example, of noise."""
        example = graph.example_input if isinstance(graph.example_input, tuple) else (graph.example_input,)
        device, layout = next(graph.model.parameters()).device, format_of_model(graph.model)
        return [self._batch(x, device, layout) if isinstance(x, torch.Tensor) else x for x in example]

    def _batch(self, x: torch.Tensor, device: torch.device, layout: torch.memory_format) -> torch.Tensor:
        batch = torch.zeros(self.batch_size, *x.shape[1:], dtype=x.dtype, device=device)
        if x.is_floating_point():
            batch.normal_(generator=torch.Generator(device).manual_seed(0))
        return batch.to(memory_format=layout) if x.dim() == 4 else batch


def cut(graph: ChannelGraph, kept: Kept) -> nn.Module:
    """A copy of the graph's model with the kept channels alone, in training mode."""
    twin = copy.deepcopy(graph)
    changes = zip(twin.spaces, (kept[space] for space in graph.spaces), strict=True)
    twin.reindex_spaces({space: mask.nonzero().flatten() for space, mask in changes if not mask.all()})
    return twin.model.train()


def widths_of(kept: Kept) -> tuple[int, ...]:
    return tuple(int(mask.sum()) for mask in kept.values())


def by_resolution(graph: ChannelGraph) -> list[list[Space]]:
    """The spaces, together with those that have as many positions where they have most; the most positions first."""
    shapes = {call.path: (call.input_shape, call.output_shape) for call in graph.calls}
    groups: dict[int, list[Space]] = {}
    for space in graph.spaces:
        known = [shapes[slot.axis.path][slot.role != "consumes"] for slot in space.slots if slot.axis.path in shapes]
        groups.setdefault(max((math.prod(shape[2:]) for shape in known), default=1), []).append(space)
    return [groups[positions] for positions in sorted(groups, reverse=True)]
