"""Which widths are really faster on this device: `prune.round_to=auto`.

A pruned width that vector units and kernels do not like can take longer than a larger one. Before a space is cut to
`width` channels, the layers around it are timed (forward and backward) at that width and at the next multiples of 4,
8, 16 and 32 up to the present one; the space then keeps the fastest of these, the smallest of those within `TIE`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from morphtrain.morph import Axis, ChannelGraph, Slot, Space

MULTIPLES = (4, 8, 16, 32)
TIE = 0.03  # of the fastest time: what repeated measurements of the same layer differ by
ROUNDS = 7


@dataclass(frozen=True)
class Layer:
    """A convolution (or linear layer, kernel 0) at one width of its inputs and outputs."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    depthwise: bool
    size: tuple[int, ...]  # of the input, spatially

    def build(self, device: torch.device) -> nn.Module:
        """The layer; behind a convolution norm and activation, whose time grows with its outputs too."""
        if not self.kernel:
            return nn.Linear(self.inputs, self.outputs).to(device)
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
        return nn.Sequential(convolution, nn.BatchNorm2d(self.outputs), nn.ReLU()).to(device)

    def input(self, batch_size: int, device: torch.device) -> torch.Tensor:
        shape = (batch_size, *self.size, self.inputs) if not self.kernel else (batch_size, self.inputs, *self.size)
        return torch.randn(shape, device=device, requires_grad=True)


class WidthProbe:
    """Times layers on a device and says to which width a space should be cut.

    Args:
        device: to measure on.
        batch_size: of the training steps that are to become fast.
        autocast: the context the network runs in.
    """

    def __init__(
        self,
        device: torch.device,
        batch_size: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.device = device
        self.batch_size = batch_size
        self.autocast = autocast
        self.seconds: dict[Layer, float] = {}

    def round_up(self, graph: ChannelGraph, space: Space, widths: Mapping[Space, int]) -> int:
        """The width, from `widths[space]` to the present one, with the shortest time; `widths`: what all are cut to."""
        least = widths[space]
        slots = [slot for slot in space.slots if _is_timed(graph, slot)]
        if least == space.size or not slots:
            return least
        candidates = sorted({least, *(min(-(-least // m) * m, space.size) for m in MULTIPLES)})
        layers = {width: [_layer(graph, slot, {**widths, space: width}) for slot in slots] for width in candidates}
        self._measure([layer for group in layers.values() for layer in group])
        seconds = {width: sum(self.seconds[layer] for layer in group) for width, group in layers.items()}
        fastest = min(seconds.values())
        if seconds[least] <= fastest * (1 + TIE):
            return least
        return min(width for width in candidates if seconds[width] <= fastest * (1 + TIE))

    def state_dict(self) -> list[dict[str, Any]]:
        """What was measured so far, as plain data."""
        return [{**asdict(layer), "seconds": seconds} for layer, seconds in self.seconds.items()]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for row in state:
            facts: Any = {
                key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in row.items()
            }
            seconds = float(facts.pop("seconds"))
            self.seconds[Layer(**facts)] = seconds

    def _measure(self, layers: list[Layer]) -> None:
        """Median of a few passes each, in turns: what slows the machine for a while slows all of them."""
        new = [layer for layer in dict.fromkeys(layers) if layer not in self.seconds]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            passes = {layer: self._pass(layer) for layer in new}
            times: dict[Layer, list[float]] = {layer: [] for layer in new}
            for number in range(ROUNDS + 1):
                for layer in new:
                    spent = passes[layer]()
                    if number:  # the first one picks and compiles kernels
                        times[layer].append(spent)
        for layer, values in times.items():
            self.seconds[layer] = statistics.median(values)

    def _pass(self, layer: Layer) -> Callable[[], float]:
        module, x = layer.build(self.device), layer.input(self.batch_size, self.device)

        def run() -> float:
            self._wait()
            start = time.perf_counter()
            with self.autocast():
                out = module(x)
            out.backward(torch.ones_like(out))
            self._wait()
            return time.perf_counter() - start

        return run

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _is_timed(graph: ChannelGraph, slot: Slot) -> bool:
    module: Any = slot.axis.module
    if slot.axis.path not in graph.input_shapes or not any(name == "weight" for name, _ in slot.axis.tensors):
        return False
    plain = isinstance(module, nn.Conv2d) and isinstance(module.padding, tuple)
    return isinstance(module, nn.Linear) or (plain and (module.groups == 1 or slot.role == "elementwise"))


def _layer(graph: ChannelGraph, slot: Slot, widths: Mapping[Space, int]) -> Layer:
    """The slot's layer once the spaces have these widths."""
    module: Any = slot.axis.module
    shape = tuple(graph.input_shapes[slot.axis.path])
    sides = {axis.role: _length(axis, widths) for axis in graph.axes if axis.module is module and axis.tensors}
    if isinstance(module, nn.Linear):
        return Layer(sides["consumes"], sides["produces"], (), (), (), (), False, shape[1:-1])
    depthwise = slot.role == "elementwise"
    outputs = sides["elementwise"] if depthwise else sides["produces"]
    inputs = outputs * module.in_channels // module.out_channels if depthwise else sides["consumes"]
    geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
    return Layer(inputs, outputs, *geometry, depthwise, shape[2:])


def _length(axis: Axis, widths: Mapping[Space, int]) -> int:
    return sum(widths[s.space] * s.span if s.space else s.fixed_size for s in axis.segments)
