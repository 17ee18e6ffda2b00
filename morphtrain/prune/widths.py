"""Which widths are really faster on this device: `prune.round_to=auto`.

Time does not fall as smoothly with the width as MACs do: vector units and kernels like some widths better than others
(`benchmarks/widths.py` shows how much on this machine). So before spaces are cut, the layers around them are timed
(forward and backward, in the network's memory format) at the widths that pruning left and at the next ones that make
inputs or outputs multiples of 4, 8, 16 and 32, and the spaces keep widths whose layers take the least time together.
With `prune.round_down` weak live channels go, too, where that reaches a width at which a MAC takes less time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from morphtrain.morph import Axis, ChannelGraph, Space, format_of_model

CPU = torch.device("cpu")
MULTIPLES = (4, 8, 16, 32)
TIE = 0.03  # of the fastest time: what repeated measurements of the same layer differ by
ROUNDS = 5  # measurements of each layer, of which the median counts
ANCHORS = 4  # layers that are timed again with new ones: by them, times that are far apart compare
SWEEPS = 3  # over the spaces, looking for single ones to change


@dataclass(frozen=True)
class Layer:
    """What is timed: a convolution (or linear layer, of no kernel) at one width of its inputs and outputs."""

    device: str
    batch_size: int
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    depthwise: bool
    size: tuple[int, ...]  # of the input, spatially
    channels_last: bool  # in memory

    def build(self) -> nn.Module:
        """The layer; behind a convolution norm and activation, whose time grows with its outputs too."""
        if not self.kernel:
            return nn.Linear(self.inputs, self.outputs, device=self.device)
        groups = self.inputs if self.depthwise else 1
        convolution = nn.Conv2d(
            self.inputs,
            self.outputs,
            self.kernel,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            groups,
            bias=False,
        )
        layers = nn.Sequential(convolution, nn.BatchNorm2d(self.outputs), nn.ReLU())
        return layers.to(self.device).to(memory_format=self.memory_format)

    def input(self) -> torch.Tensor:
        shape = (*self.size, self.inputs) if not self.kernel else (self.inputs, *self.size)
        x = torch.randn(self.batch_size, *shape, device=self.device)
        return (x.to(memory_format=self.memory_format) if self.kernel else x).requires_grad_()

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a sample's forward pass."""
        positions = math.prod(self.size) // math.prod(self.stride)
        return math.prod(self.kernel) * positions * self.outputs * (1 if self.depthwise else self.inputs)


@dataclass(eq=False)
class Place:
    """A layer in the network; its widths are those of the spaces on its two sides (one axis, if it is depthwise)."""

    module: Any
    size: tuple[int, ...]
    inputs: Axis
    outputs: Axis
    channels_last: bool

    @property
    def spaces(self) -> set[Space]:
        return {segment.space for axis in (self.inputs, self.outputs) for segment in axis.segments if segment.space}

    def at(self, widths: Mapping[Space, int], device: str, batch_size: int) -> Layer:
        """The layer once the spaces have these widths."""
        inputs, outputs = self.inputs.length_at(widths), self.outputs.length_at(widths)
        if isinstance(self.module, nn.Linear):
            return Layer(device, batch_size, inputs, outputs, (), (), (), (), False, self.size, False)
        depthwise = self.inputs is self.outputs
        inputs = outputs * self.module.in_channels // self.module.out_channels if depthwise else inputs
        geometry = (self.module.kernel_size, self.module.stride, self.module.padding, self.module.dilation)
        return Layer(device, batch_size, inputs, outputs, *geometry, depthwise, self.size, self.channels_last)


class WidthProbe:
    """Times layers on a device and says to which widths spaces should be cut.

    Args:
        device: to measure on.
        batch_size: of the training steps that are to become fast.
        autocast: the context the network runs in.

    All three may be set anew at any time.
    """

    def __init__(
        self,
        device: torch.device = CPU,
        batch_size: int = 1,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.device = device
        self.batch_size = batch_size
        self.autocast = autocast
        self.seconds: dict[Layer, float] = {}
        self.again: dict[Layer, float] = {}  # of those that a choice came down to, in a second measurement

    def fastest(
        self,
        graph: ChannelGraph,
        least: Mapping[Space, int],
        roundings: Iterable[Mapping[Space, int]],
        floors: Mapping[Space, int] | None = None,
    ) -> dict[Space, int]:
        """The widths, each from its `least` up to the present one, whose layers take the least time together.

        A layer is fast when both its sides suit it, so `roundings`, of all spaces to one multiple, are tried first;
        from the best of these, single spaces change as long as that saves time. Of widths that are equal but for noise
        the smallest: pruning's own if no others save more than noise, timed once more: of many measured times the
        shortest is likely one that was measured too short. Last, with `floors`, spaces go below that, as far as their
        floor, to where a MAC takes less time.
        """
        shrinking = [space for space in graph.spaces if least[space] < space.size]
        places = timed_places(graph)
        changed = [place for place in places if not place.spaces.isdisjoint(shrinking)]
        first: list[Mapping[Space, int]] = [least, *roundings]
        self._measure([layer for widths in first for layer in self._layers(changed, widths)])
        fastest = min(first, key=lambda widths: self._total(changed, widths))
        best = dict(fastest)
        for _ in range(SWEEPS):
            before = dict(best)
            for space in shrinking:
                near = [place for place in changed if space in place.spaces]
                if near:
                    best[space] = self._narrowest(near, best, space, least[space])
            if best == before:
                break
        seconds, plain = self._again(changed, best, least)
        chosen = best if seconds < (1 - TIE) * plain else dict(least)
        return chosen if floors is None else self._below(places, chosen, floors)

    def _below(self, places: list[Place], widths: dict[Space, int], floors: Mapping[Space, int]) -> dict[Space, int]:
        """`widths`, some of them lower, if the time of a MAC falls by more than noise for it."""
        lower = dict(widths)
        for space, floor in floors.items():
            near = [place for place in places if space in place.spaces]
            axes = [axis for place in near for axis in (place.inputs, place.outputs)]
            steps = {width for axis in axes for width in _suiting(axis, lower, space, floor) if width < lower[space]}
            if not steps:
                continue
            candidates = [{**lower, space: width} for width in (lower[space], *sorted(steps, reverse=True))]
            costs = [self._total(near, choice) / self._macs(near, choice) for choice in candidates]
            if min(costs) < (1 - TIE) * costs[0]:
                lower = candidates[costs.index(min(costs))]
        changed = [place for place in places if any(lower[space] < widths[space] for space in place.spaces)]
        seconds, before = self._again(changed, lower, widths)
        pays = seconds * self._macs(changed, widths) < (1 - TIE) * before * self._macs(changed, lower)
        return lower if pays else widths

    def _again(self, places: list[Place], *choices: Mapping[Space, int]) -> list[float]:
        """What the layers take together at each of the choices of widths, in a second measurement, side by side."""
        layers = [self._layers(places, widths) for widths in choices]
        every = dict.fromkeys(layer for choice in layers for layer in choice)
        if not self.again.keys() >= every.keys():
            self.again.update(self.timed(every))
        return [sum(self.again[layer] for layer in choice) for choice in layers]

    def _narrowest(self, places: list[Place], widths: Mapping[Space, int], space: Space, least: int) -> int:
        """The smallest width of `space` with which these layers are as fast as they get, all others being as given."""
        axes = [axis for place in places for axis in (place.inputs, place.outputs)]
        candidates = sorted({least, *(width for axis in axes for width in _suiting(axis, widths, space, least))})
        seconds = {width: self._total(places, {**widths, space: width}) for width in candidates}
        return next(width for width in candidates if seconds[width] <= min(seconds.values()) * (1 + TIE))

    def _total(self, places: Iterable[Place], widths: Mapping[Space, int]) -> float:
        layers = self._layers(places, widths)
        self._measure(layers)
        return sum(self.seconds[layer] for layer in layers)

    def _macs(self, places: Iterable[Place], widths: Mapping[Space, int]) -> int:
        return sum(layer.macs for layer in self._layers(places, widths))

    def _layers(self, places: Iterable[Place], widths: Mapping[Space, int]) -> list[Layer]:
        return [place.at(widths, str(self.device), self.batch_size) for place in places]

    def state_dict(self) -> list[dict[str, Any]]:
        """What was measured so far, as plain data."""
        return [
            {**asdict(layer), "seconds": seconds, "again": self.again.get(layer)}
            for layer, seconds in self.seconds.items()
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for row in state:
            facts: Any = {
                key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in row.items()
            }
            seconds, again = facts.pop("seconds"), facts.pop("again")
            layer = Layer(**facts)
            self.seconds[layer] = seconds
            if again is not None:
                self.again[layer] = again

    def _measure(self, layers: Iterable[Layer]) -> None:
        """Time those of the layers that `seconds` lacks, at the speed the machine had when its first were timed."""
        new = [layer for layer in dict.fromkeys(layers) if layer not in self.seconds]
        if new:
            anchors = list(self.seconds)[:ANCHORS]
            found = self.timed([*anchors, *new])
            before, now = (sum(times[layer] for layer in anchors) for times in (self.seconds, found))
            self.seconds.update({layer: found[layer] * (before / now if anchors else 1.0) for layer in new})

    def timed(self, layers: Iterable[Layer]) -> dict[Layer, float]:
        """Seconds of each layer, once each.

        The median of a few passes each, in turns: what slows the machine for a while slows all of them.
        """
        new = list(layers)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            passes = {layer: self._pass(layer) for layer in new}
            times: dict[Layer, list[float]] = {layer: [] for layer in new}
            for number in range(ROUNDS + 1):
                for layer in new:
                    spent = passes[layer]()
                    if number:  # the first one picks and compiles kernels
                        times[layer].append(spent)
        return {layer: statistics.median(values) for layer, values in times.items()}

    def _pass(self, layer: Layer) -> Callable[[], float]:
        module, x = layer.build(), layer.input()

        def run() -> float:
            self._wait()
            start = time.perf_counter()
            with torch.enable_grad():
                with self.autocast():
                    out = module(x)
                out.backward(torch.ones_like(out))
            self._wait()
            return time.perf_counter() - start

        return run

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def timed_places(graph: ChannelGraph) -> list[Place]:
    """The layers whose time follows from their widths: linear, ungrouped and depthwise two-dimensional convolutions."""
    places = []
    last = format_of_model(graph.model) is torch.channels_last
    shapes = {call.path: tuple(call.input_shape) for call in graph.calls}
    sides: dict[int, dict[str, Axis]] = {}
    for axis in graph.axes:
        if any(name == "weight" for name, _ in axis.tensors):
            sides.setdefault(id(axis.module), {})[axis.role] = axis
    for axes in sides.values():
        outputs = axes.get("produces") or axes.get("elementwise")
        module: Any = outputs.module if outputs else None
        if outputs is None or outputs.path not in shapes:
            continue
        shape = shapes[outputs.path]
        plain = isinstance(module, nn.Conv2d) and isinstance(module.padding, tuple)
        if plain and module.groups > 1 and outputs.role == "elementwise":
            places.append(Place(module, shape[2:], outputs, outputs, last))
        elif isinstance(module, nn.Linear) and "consumes" in axes:
            places.append(Place(module, shape[1:-1], axes["consumes"], outputs, last))
        elif plain and module.groups == 1 and "consumes" in axes:
            places.append(Place(module, shape[2:], axes["consumes"], outputs, last))
    return places


def _suiting(axis: Axis, widths: Mapping[Space, int], space: Space, least: int) -> Iterator[int]:
    """Widths of `space`, `least` or more, with which the whole of `axis` is a multiple, all other spaces as given."""
    span = sum(segment.span for segment in axis.segments if segment.space is space)
    rest = axis.length_at({**widths, space: 0})
    for multiple in MULTIPLES if span else ():
        length = -(-(rest + span * least) // multiple) * multiple
        yield min(-(-(length - rest) // span), space.size)
