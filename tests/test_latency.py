"""Measured seconds of layers: what is timed, what is made of it, and what is kept for the next run."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import trace
from topologies import TOPOLOGIES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from morphtrain.cost import WidthCost, latency, latency_file, layer_steps, measured_cost, stopwatch
from morphtrain.cost.latency import Timing, fastest, fitted
from morphtrain.cost.latency_file import directory
from morphtrain.cost.layer_steps import LayerSteps
from morphtrain.cost.widths import Term, layers_of
from morphtrain.model import ResNet
from morphtrain.model.mobilenet import MobileNet
from morphtrain.morph import ChannelGraph
from morphtrain.morph.formats import format_of
from morphtrain.norm.ghost import to_ghost

FORMATS = (torch.contiguous_format, torch.channels_last)


def resnet(width: int = 16, layout: torch.memory_format = torch.contiguous_format) -> ChannelGraph:
    model = ResNet(blocks=1, width=width, shortcut="B").to(memory_format=layout)
    return ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8))


class Watched(LayerSteps):
    """Notes what its steps work on."""

    def _block(self, layer: Any, widths: Any) -> Any:
        block = super()._block(layer, widths)
        self.seen: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        block.register_forward_hook(lambda _, inputs, output: self.seen.append((block, *inputs, output)))
        return block


@pytest.mark.parametrize("width", [16, 40])
def test_a_step_does_the_arithmetic_of_the_layer_at_these_widths(width: int) -> None:
    """Counted by torch: forward, the gradient of the weight and, except for the first layer, that of the input."""
    graph = resnet(width)
    steps = LayerSteps(graph, batch_size=6)
    for layer, (_, term) in zip(layers_of(graph), WidthCost(graph, "flops").layers, strict=True):
        assert len(steps.widths(layer)) >= 2
        for widths in steps.widths(layer):
            with FlopCounterMode(display=False) as counted:
                steps.step(layer, widths)()
            passes = 2 if layer.call is graph.calls[0] else 3
            assert counted.get_total_flops() == passes * 6 * term.at(*widths), (layer.call.path, widths)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("layout", FORMATS)
def test_a_step_is_like_the_networks_own(layout: torch.memory_format, cast: bool) -> None:
    """Norm and activation, type, format and batch as there; neither the network nor the random numbers change."""
    graph = resnet(16, layout)
    to_ghost(graph.model, 3)
    graph = ChannelGraph.trace(graph.model, torch.zeros(1, 3, 8, 8))

    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast)

    shapes: dict[str, tuple[Any, ...]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, x, y, path=path: shapes.update({path: (x[0].shape, y.shape, x[0].dtype, format_of(x[0]))})
        )
        for path, module in graph.model.named_modules()
    ]
    with autocast():
        graph.model(torch.randn(6, 3, 8, 8).to(memory_format=layout))
    for handle in handles:
        handle.remove()
    before = {name: tensor.clone() for name, tensor in graph.model.state_dict().items()}
    state, mode = torch.random.get_rng_state(), graph.model.training
    steps = Watched(graph, 6, autocast)
    for layer in layers_of(graph):
        widths = (layer.module.weight.shape[0], layer.module.weight.shape[1])
        assert widths == steps.widths(layer)[0], "its own widths are the first"
        steps.step(layer, widths)()
        ((block, x, y),) = steps.seen
        wanted = shapes[layer.call.path]
        assert (x.shape, y.shape, x.dtype) == wanted[:3]
        assert format_of(x) is wanted[3]
        assert x.requires_grad == (layer.call.path != graph.calls[0].path)
        norm = steps.norms.get(layer.call.norm)
        kinds = [type(layer.module)] if norm is None else [type(layer.module), type(norm), nn.ReLU]
        assert [type(part) for part in block] == kinds
        assert block.training
        assert all(parameter.grad is None for parameter in block.parameters())
        assert format_of(block[0].weight) is format_of(layer.module.weight)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert graph.model.training is mode
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.model.state_dict().items())
    assert all(parameter.grad is None for parameter in graph.model.parameters())


NETS: dict[str, Callable[[], nn.Module]] = {
    name: kind for name, (kind, _) in TOPOLOGIES.items() if name not in ("Functional", "SeveralInputs")
}
NETS["mobilenet"] = lambda: MobileNet(version=2, width_multiplier=0.25).double()


@pytest.mark.parametrize("name", NETS)
def test_every_layer_has_steps_at_all_its_widths(name: str) -> None:
    """Grouped, depthwise, transposed, linear: in each the output has as many channels as the widths say."""
    graph = ChannelGraph.trace(NETS[name]().double(), torch.zeros(1, 3, 8, 8, dtype=torch.double))
    steps = Watched(graph, 4)
    for layer in layers_of(graph):
        for widths in steps.widths(layer):
            steps.step(layer, widths)()
            ((block, _, output),) = steps.seen
            module = block[0]
            assert tuple(module.weight.shape[:2]) == widths
            assert len(output) == 4 * layer.call.output_shape[0] // 2
            assert output.shape[2:] == layer.call.output_shape[2:] or isinstance(module, nn.Linear)
            assert all(n <= size for n, size in zip(widths, layer.module.weight.shape[:2], strict=True))


def test_the_widths_of_a_layer_are_on_the_ladder_of_channels() -> None:
    graph = resnet(40)
    steps = LayerSteps(graph, 4)
    for layer in layers_of(graph):
        own = tuple(layer.module.weight.shape[:2])
        for widths in steps.widths(layer):
            for side, n, size in zip(layer.sides, widths, own, strict=True):
                assert n == size or (side.changes and n % layer_steps.LADDER == 0)
    flat = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Flatten(), nn.Linear(32 * 16, 10))
    graph = ChannelGraph.trace(flat, torch.zeros(1, 3, 4, 4))
    head = layers_of(graph)[-1]
    assert {n1 // 16 for _, n1 in LayerSteps(graph, 4).widths(head)} == {32, 24, 16, 8}, "16 entries a channel"


def error(term: Term, times: Mapping[tuple[int, int], float]) -> float:
    return sum((term.at(*place) / time - 1) ** 2 for place, time in times.items())


TERMS = st.tuples(*(st.one_of(st.just(0.0), st.floats(1e-9, 1e-3)) for _ in range(4))).filter(any)


@settings(max_examples=50, deadline=None)
@given(term=TERMS, noise=st.lists(st.floats(0.5, 2.0), min_size=6, max_size=6))
def test_a_term_is_found_again_and_never_negative(term: tuple[float, ...], noise: list[float]) -> None:
    places = [(64, 64), (64, 32), (32, 64), (48, 48), (32, 32), (16, 16)]
    found = fitted({place: Term(*term).at(*place) for place in places})
    for place in [*places, (8, 64), (64, 8), (24, 40), (128, 128)]:
        assert found.at(*place) == pytest.approx(Term(*term).at(*place), rel=1e-4)
    times = {place: Term(*term).at(*place) * n for place, n in zip(places, noise, strict=True)}
    rough = fitted(times)
    assert min(rough) >= 0
    assert all(math.isfinite(part) for part in rough)
    assert error(rough, times) <= error(Term(*term), times) * (1 + 1e-6), "the share that is wrong counts"


class Clock:
    """Time that passes only in the steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.order = 0.0, []
        monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: self.now)

    def step(self, name: str, seconds: Iterator[float]) -> Callable[[], None]:
        def run() -> None:
            self.order.append(name)
            self.now += next(seconds)

        return run


def always(*seconds: float) -> Iterator[float]:
    yield from seconds
    while True:
        yield seconds[-1]


CPU = torch.device("cpu")


def test_the_fastest_of_each_step_counts_once_it_was_seen_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    steady = clock.step("steady", always(9.0, 2.0))  # the first pass maps memory
    shaken = clock.step("shaken", always(9.0, 1.0, 5.0, 1.0, 4.0, 3.0, 1.05, 1.0))
    assert fastest([steady, shaken], CPU, limit=1e9) == [Timing(2.0, True), Timing(1.0, True)]
    assert clock.order[:4] == ["steady"] * 2 + ["shaken"] * 2
    assert clock.order[4:10] == ["steady", "shaken", "shaken", "steady", "steady", "shaken"], "in turns"
    assert clock.order[10:] == ["shaken"] * (len(clock.order) - 10), "the steady one is known"


def test_what_is_never_seen_twice_is_disturbed_and_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    drifting = clock.step("drifting", always(*(1.3**-n for n in range(100))))
    (timing,) = fastest([drifting], CPU, limit=1e9)
    assert not timing.agrees
    assert len(clock.order) == 2 + latency.MOST_ROUNDS
    clock.order.clear()
    slow = [clock.step(str(number), always(10.0)) for number in range(3)]
    assert [timing.seconds for timing in fastest(slow, CPU, limit=5.0)] == [10.0] * 3
    assert len(clock.order) == 3 * (2 + 1), "a round is finished, no other is begun"


def test_short_steps_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    (timing,) = fastest([clock.step("short", always(latency.LEAST / 9.5))], CPU, limit=1e9)
    assert timing.seconds == pytest.approx(latency.LEAST / 9.5)
    assert len(clock.order) == 2 + 10 * latency.ROUNDS


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[set[Any]]]:
    """What measurements were asked for; they take what `seconds` says."""
    asked: list[set[Any]] = []

    def measure(steps: LayerSteps, places: Mapping[Any, Any], limit: float) -> tuple[dict[Any, Timing], bool]:
        asked.append(set(places))
        return {place: Timing(seconds(*place), True) for place in places}, True

    monkeypatch.setattr(latency, "_measured", measure)
    monkeypatch.setattr(latency_file, "directory", lambda: tmp_path / "cache" / "latency")
    yield asked


def term(kind: str) -> Term:
    """Different for every kind of layer."""
    size = 1 + sum(map(ord, kind)) % 7
    return Term(1e-6 * size, 2e-6, 3e-6 * size, 1e-4)


def seconds(kind: str, widths: tuple[int, int]) -> float:
    return term(kind).at(*widths)


def check(cost: WidthCost, graph: ChannelGraph, batch_size: int = 8) -> None:
    """At any widths it is what the layers would take."""
    steps = LayerSteps(graph, batch_size)
    for share in (1.0, 0.6, 0.25):
        widths = {space: max(1, round(share * space.size)) for space in graph.spaces}
        sides = [[side.length(widths) for side in layer.sides] for layer in layers_of(graph)]
        wanted = sum(term(steps.kind(la)).at(*n) for la, n in zip(layers_of(graph), sides, strict=True))
        assert cost(widths) == pytest.approx(wanted, rel=1e-3)


def test_the_cost_is_the_sum_over_the_layers_and_is_measured_once(measured: list[set[Any]]) -> None:
    graph = resnet()
    check(measured_cost(graph, 8), graph)
    assert len(measured) == 1
    check(measured_cost(graph, 8), graph)
    assert len(measured) == 1, "the file knows"
    wider = resnet(32)
    check(measured_cost(wider, 8), wider)
    steps = LayerSteps(wider, 8)
    asked = {(steps.kind(layer), widths) for layer in layers_of(wider) for widths in steps.widths(layer)}
    assert measured[1] == asked - measured[0], "only what is new"
    check(measured_cost(graph, 8), graph)
    check(measured_cost(wider, 8), wider)
    assert len(measured) == 2


def test_other_circumstances_are_measured_for_themselves(measured: list[set[Any]], monkeypatch: Any) -> None:
    graph = resnet()
    costs = [
        lambda: measured_cost(graph, 8),
        lambda: measured_cost(graph, 16),
        lambda: measured_cost(graph, 8, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        lambda: measured_cost(resnet(layout=torch.channels_last), 8),
    ]
    for make in (*costs, *costs):
        make()
    assert len(measured) == 4
    machine = latency._machine(CPU)
    for fact in machine:
        monkeypatch.setattr(latency, "_machine", lambda _, fact=fact: {**machine, fact: "other"})
        costs[0]()
    assert len(measured) == 4 + len(machine)
    assert {"processor", "threads", "torch"} <= set(machine)


def test_terms_that_are_known_are_used_as_they_are(measured: list[set[Any]]) -> None:
    graph, known = resnet(), {}
    first = measured_cost(graph, 8, known=known)
    assert set(known) == {LayerSteps(graph, 8).kind(layer) for layer in layers_of(graph)}
    assert json.loads(json.dumps(known)) == known, "plain data for a checkpoint"
    again = measured_cost(graph, 64, known=known)
    assert again() == first()
    for kind in known:
        known[kind] = [0.0, 0.0, 0.0, 1.0]
    assert measured_cost(graph, 8, known=known)() == len(layers_of(graph))
    graph.reindex(graph.spaces[0], range(5))
    graph.retrace()
    assert measured_cost(graph, 8, known=known)() == len(layers_of(graph)), "the widths are not part of a kind"
    assert len(measured) == 1


def with_time(path: Path, time: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": {"Conv2d": {"8x8": time}}}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_bytes(b"\xff\x00"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(path.read_text().replace("torch", "other")),  # of another machine
        lambda path: with_time(path, "1"),
        lambda path: with_time(path, -1.0),
        lambda path: with_time(path, math.nan),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_file_that_is_damaged_or_foreign_is_measured_again(
    measured: list[set[Any]], damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    graph = resnet()
    measured_cost(graph, 8)
    (path,) = latency_file.directory().iterdir()
    damage(path)
    check(measured_cost(graph, 8), graph)
    assert measured[1] == measured[0]
    assert f"{path}: not used, so layers are measured again" in caplog.text
    if path.is_file():
        check(measured_cost(graph, 8), graph)
        assert len(measured) == 2, "it is whole again"


def test_without_a_place_to_keep_them_times_are_measured_each_time(
    measured: list[set[Any]], monkeypatch: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(latency_file, "directory", lambda: tmp_path / "file" / "latency")
    graph = resnet()
    for _ in range(2):
        check(measured_cost(graph, 8), graph)
    assert len(measured) == 2
    assert "not kept for the next run" in caplog.text


def test_the_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for cache in (None, "", "relative"):  # the specification says to ignore relative paths
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if cache is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert directory() == tmp_path / "home" / ".cache" / "morphtrain" / "latency"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert directory() == tmp_path / "cache" / "morphtrain" / "latency"


@pytest.mark.parametrize(("sound", "agrees"), [(True, False), (False, True)])
def test_what_others_disturbed_serves_this_run_only(
    measured: list[set[Any]], monkeypatch: Any, sound: bool, agrees: bool
) -> None:
    def measure(steps: LayerSteps, places: Mapping[Any, Any], limit: float) -> tuple[dict[Any, Timing], bool]:
        measured.append(set(places))
        return {place: Timing(seconds(*place), agrees) for place in places}, sound

    monkeypatch.setattr(latency, "_measured", measure)
    graph = resnet()
    for _ in range(2):
        check(measured_cost(graph, 8), graph)
    assert measured[1] == measured[0]


def test_another_process_takes_the_first_ones_numbers(measured: list[set[Any]], monkeypatch: Any) -> None:
    graph, first = resnet(), {}
    measured_cost(graph, 8, known=first)
    monkeypatch.setattr(latency, "decide", lambda make: first)  # which calls nothing in another process
    monkeypatch.setattr(latency_file, "read", None)
    assert measured_cost(graph, 8)() == pytest.approx(sum(Term(*first[k]).at(*w) for k, w in own_widths(graph)))


def own_widths(graph: ChannelGraph) -> list[tuple[str, tuple[int, int]]]:
    steps = LayerSteps(graph, 8)
    return [(steps.kind(layer), steps.widths(layer)[0]) for layer in layers_of(graph)]


def test_two_that_write_at_once_leave_a_whole_file(measured: list[set[Any]]) -> None:
    facts = {"torch": "2"}
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(facts, name)) for name in ("one", "two")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if latency_file.path_of(facts).exists():
            assert set(json.loads(latency_file.path_of(facts).read_text())) == {"facts", "seconds"}
    assert [writer.exitcode for writer in writers] == [0, 0]
    (last,) = {len(times) for times in latency_file.read(facts).values() if len(times) == 30} or {0}
    assert last == 30, "who wrote last has lost nothing of its own"
    assert list(latency_file.directory().iterdir()) == [latency_file.path_of(facts)]


def write_many(facts: dict[str, str], name: str) -> None:
    for number in range(30):
        latency_file.add(facts, {name: {f"{n}x1": 1.0 + n for n in range(number + 1)}})


@pytest.mark.parametrize(
    ("share", "threads", "sound"), [(0.0, 1, True), (0.5, 1, True), (0.7, 1, False), (0.2, 2, False)]
)
def test_others_may_use_what_this_process_leaves(share: float, threads: int, sound: bool, monkeypatch: Any) -> None:
    """Of two CPUs one is enough for a thread, and none is left over by two."""
    monkeypatch.setattr(latency.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(latency.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(latency.ForeignCpu, "share", lambda self: share)
    monkeypatch.setattr(latency, "fastest", lambda steps, device, limit: [Timing(1.0, True)] * len(steps))
    graph = resnet()
    steps = LayerSteps(graph, 2)
    (layer, *_) = layers_of(graph)
    place = (steps.kind(layer), steps.widths(layer)[0])
    assert latency._measured(steps, {place: layer}, 1.0) == ({place: Timing(1.0, True)}, sound)


def test_this_machine_is_measured_in_a_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latency_file, "directory", lambda: tmp_path)
    graph = trace(ResNet(blocks=1, width=8).double())
    cost = measured_cost(graph, 4, limit=0.2)
    assert 0 < cost() < 10
    narrow = cost({space: max(1, space.size // 2) for space in graph.spaces})
    assert 0 < narrow <= cost()
