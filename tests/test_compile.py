"""compile=default: which passes go through torch.compile, that they compute the same, and when it is done again."""

from __future__ import annotations

import gc
import logging
import math
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory_format import stop_after
from test_resume import assert_same
from torch import nn
from whole_runs import trained_to_the_end

import morphtrain
from morphtrain import compilation, schema
from morphtrain.compilation import Compilation, usual_pass
from morphtrain.errors import UserError
from morphtrain.state import Run, passes
from morphtrain.trainer.build import build_run

CPU = torch.device("cpu")
Forward = Callable[[torch.Tensor], torch.Tensor]


def config_of(*overrides: str) -> schema.Config:
    small = [o for o in SMALL if not (o.startswith("prune") and "prune=none" in overrides)]
    return morphtrain.compose(*small, "tracking=none", "device=cpu", "compile=default", *overrides)


def trained(*overrides: str) -> Run:
    """A run after its last epoch."""
    return trained_to_the_end(config_of(*overrides))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all passes through compiled code, which here computes something a little different."""
    shapes: list[tuple[int, ...]] = []

    def stand_in(model: nn.Module, mode: str) -> Forward:
        def forward(images: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(images.shape))
            return model(images) * 1.01

        return forward

    monkeypatch.setattr(compilation, "compiled", stand_in)
    return shapes


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes no time and saves half of it, whatever the clock says: it is done again after an epoch."""

    def measure(self: Compilation) -> None:
        if self._times[True]:
            self.seconds, self.ratio = 0.0, 0.5

    monkeypatch.setattr(Compilation, "_measure", measure)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """What torch.compile makes of the networks, run operation by operation: the same bits as without it."""
    graphs: list[weakref.ref[Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(weakref.ref(graph))
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    return graphs


def test_passes_of_one_shape_are_compiled_after_a_few_steps(compiled: list, pays: None) -> None:
    """250 images in batches of 16: 15 whole ones an epoch, of which the first four are timed without it, and a rest."""
    trained("data.train_samples=250", "epochs=3", "prune=none")
    assert set(compiled) == {(16, 3, 8, 8)}
    assert len(compiled) == (15 - 4) + 15 + 15


def test_in_passes_most_are_compiled(compiled: list, pays: None) -> None:
    trained("data.train_samples=64", "epochs=1", "prune=none", "batch_policy.max_micro_batch=6")  # 16 = 6 + 5 + 5
    assert compiled == [(5, 3, 8, 8)] * 2 * 3  # one step of four is timed without


@given(batch_size=st.integers(1, 300), micro_batch=st.integers(1, 300))
def test_the_usual_pass_is_the_most_frequent(batch_size: int, micro_batch: int) -> None:
    parts = passes(batch_size, micro_batch)
    sizes = [len(part) for part in torch.zeros(batch_size).tensor_split(parts)]
    assert sizes.count(usual_pass(batch_size, parts)) == max(map(sizes.count, sizes))


def test_evaluation_and_settling_are_not_compiled(compiled: list, pays: None) -> None:
    run = trained("epochs=1", "prune=none")
    assert len(compiled) == 16 - 4
    assert run.model.state_dict().keys() == trained("epochs=1", "prune=none", "compile=none").model.state_dict().keys()


def test_after_a_change_it_waits_until_it_pays_and_resumes_alike(
    compiled: list, pays: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which steps are compiled shows in the bits; interrupted before and after the network is compiled again."""
    grown = ["prune=none", "grow=wider", "grow.at_epochs=[2]", "epochs=6"]
    ends = {}
    with caplog.at_level(logging.INFO):
        for name, stops in {"whole": [6], "before": [3, 6], "after": [4, 6], "at": [2, 6]}.items():
            (tmp_path / name).mkdir()
            for number, last in enumerate(stops):
                config = config_of(*grown, f"resume={'auto' if number else 'never'}")
                stop_after(last, config, tmp_path / name)
            stored = torch.load(tmp_path / name / "last.pt", weights_only=True)
            ends[name] = {"model": stored["model"], "optimizer": stored["optimizer"]}
            if name == "whole":
                assert [line for line in caplog.messages if line.startswith("compile=")] == [
                    "compile=default: off: the network or its batches have changed; on again when that pays",
                    next(line for line in caplog.messages if "compiled again: 0 s once" in line),
                ]
                assert len(compiled) == (16 - 4) + 16 + 0 + (16 - 4) + 16 + 16  # an epoch to see what it takes
    for name in ("before", "after", "at"):
        assert_same(ends[name], ends["whole"], name)


def test_larger_batches_and_images_count_as_changes(compiled: list, pays: None) -> None:
    trained("prune=none", "epochs=4", "batch_policy=adabatch", "batch_policy.every=2", "batch_policy.max_batch_size=32")
    assert [compiled.count((size, 3, 8, 8)) for size in (16, 32)] == [12 + 16, 8 - 2]
    now = Compilation("default", CPU)
    for epoch, side in enumerate((8, 8, 12, 12, 12), start=1):
        now.begin_epoch(whole_batches=6, usual=4)
        for _ in range(6):
            with now.step(whole=True):
                now(nn.Flatten(), torch.zeros(4, 1, side, side))
        now.end_epoch(epoch, 9, 1.0, changed=False, usual=4)
    assert [compiled.count((4, 1, side, side)) for side in (8, 12)] == [4 + 6, 4]


class Timed(SimpleNamespace):
    """A machine whose clock goes by what is asked of it: eager steps, compiled ones, and compiling."""

    def perf_counter(self) -> float:
        return self.now

    def forward(self, model: nn.Module, mode: str) -> Forward:
        self.now += self.compiling

        def run(images: torch.Tensor) -> torch.Tensor:
            self.now += self.fast
            return images

        return run

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.now += 1.0
        return images


def epoch_of(steps: Compilation, machine: Timed, number: int, epochs: int, changed: bool) -> float:
    """Seconds of an epoch of ten steps."""
    start = machine.now
    steps.begin_epoch(10, 4)
    for _ in range(10):
        with steps.step(whole=True):
            steps(machine, torch.zeros(4, 1))  # type: ignore[arg-type]
    steps.end_epoch(number, epochs, machine.now - start, changed, 4)
    return machine.now - start


def on(machine: Timed, monkeypatch: pytest.MonkeyPatch) -> Compilation:
    monkeypatch.setattr(compilation, "time", machine)
    monkeypatch.setattr(compilation, "compiled", machine.forward)
    return Compilation("default", CPU)


def test_what_it_takes_and_saves_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Timed(now=0.0, fast=0.25, compiling=30.0)
    steps = on(machine, monkeypatch)
    epoch_of(steps, machine, 1, 9, changed=False)
    assert (steps.seconds, steps.ratio, steps.spent_seconds) == (30.0, 0.25, 30.0)
    assert epoch_of(steps, machine, 2, 9, changed=False) == 2.5
    assert steps.spent_seconds == 0.0


def test_what_is_slower_is_switched_off_for_good(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Timed(now=0.0, fast=1.5, compiling=1.0)
    steps = on(machine, monkeypatch)
    with caplog.at_level(logging.INFO):
        seconds = [epoch_of(steps, machine, number, 20, changed=number == 5) for number in range(1, 20)]
    assert seconds[1:] == [10.0] * 18
    assert caplog.messages[-1] == "compile=default: off: steps are no faster with it (1.50 of the time without)"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lives=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    compiling=st.floats(1.0, 60.0),
    fast=st.floats(0.1, 0.9),
)
def test_it_costs_at_most_twice_what_foresight_would(lives: list[int], compiling: float, fast: float) -> None:
    """After the first network, whose epochs are compiled in any case: the best is to compile at once or never."""
    with pytest.MonkeyPatch.context() as patched:
        machine = Timed(now=0.0, fast=fast, compiling=compiling)
        steps = on(machine, patched)
        epochs = 1 + sum(lives)
        changes = {1 + sum(lives[:i]) for i in range(len(lives))}
        lost = {}
        for number in range(1, epochs + 1):
            lost[number] = epoch_of(steps, machine, number, epochs, number in changes) - 10 * fast
        saved, begin = 10 * (1 - fast), 1
        for life in lives:
            spent = sum(lost[number] for number in range(begin + 1, begin + life + 1))
            best = min(compiling, saved * life)
            eager_steps = 3 * (1 - fast)  # that are timed when it begins
            assert spent <= 2 * best + saved + eager_steps + 1e-6
            begin += life


@pytest.mark.parametrize(
    "options",
    [
        ["model.shortcut=B", "prune.residual=gating", "norm=ghost", "norm.ghost_batch_size=6"],
        ["memory_format=channels_last", "precision=bf16", "grow=deeper", "grow.at_epochs=[2]", "clip_norm=1"],
        ["norm=weight", "norm.mean_only=true", "optimizer.lr=0.03", "grow=wider", "grow.at_epochs=[2]"],
        ["gradient=approximate", "grow=deeper", "grow.at_epochs=[2]"],
        pytest.param(
            ["gradient=approximate", "gradient.kind=top1", "precision=o2", "grow=wider", "grow.at_epochs=[2]"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_operation_by_operation_it_computes_the_same(options: list[str], captured: list, pays: None) -> None:
    """All the way through changes of structure, with every buffer and the optimizer's state."""
    small = ["data.train_samples=96", "data.val_samples=16", "prune.start_epoch=1", "prune.interval=2"]
    shorter = ["epochs=6", *small, *options]
    run, plain = trained(*shorter), trained(*shorter, "compile=none")
    assert len(captured) >= 2, "it is compiled again"
    assert any(record["changed"] for record in run.history)
    assert_same(run.model.state_dict(), plain.model.state_dict())
    assert_same(run.optimizer.state_dict(), plain.optimizer.state_dict())
    times = {"seconds", "timestamp", "samples_per_second", "memory"}
    for a, b in zip(run.history, plain.history, strict=True):
        alike = {key for key in b if not any(name in key for name in times)}
        assert {key: a[key] for key in alike} == {key: b[key] for key in alike}
        assert "compile_seconds" in a and "compile_seconds" not in b


def test_a_hook_that_is_set_later_is_called(captured: list) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    forward = compilation.compiled(model, "default")
    x, seen = torch.randn(4, 2), []
    forward(x)
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    torch.testing.assert_close(forward(x), model(x))
    assert seen == [4, 4]
    assert captured


def test_code_that_is_dropped_is_freed_however_often_it_is_made(captured: list) -> None:
    """torch compiles a function eight times and then no more; each network has a function of its own."""
    model = nn.Linear(2, 3)
    for width in range(3, 15):
        forward = compilation.compiled(model, "default")
        model.weight, model.bias = nn.Parameter(torch.randn(width, 2)), nn.Parameter(torch.randn(width))
        assert forward(torch.randn(4, 2)).shape == (4, width)
    assert len(captured) == 12
    del forward
    gc.collect()
    assert [graph() for graph in captured] == [None] * 12


def test_what_torch_cannot_compile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no such operation")

    monkeypatch.setattr(compilation, "BACKEND", refuse)
    with pytest.raises(UserError) as found:
        trained("epochs=1", "prune=none")
    expected = "compile=default: no such operation; compile=none trains without it"
    assert str(found.value) == expected


def test_errors_of_others_stay_what_they_are() -> None:
    steps = Compilation("default", CPU)
    steps.begin_epoch(4, 4)
    with pytest.raises(ZeroDivisionError), steps.step(whole=True):
        raise ZeroDivisionError


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "fx_graph_cache", False)
    steps = Compilation("default", CPU)
    steps.begin_epoch(1, 4)
    with (
        pytest.raises(UserError, match=r"^compile=default: .* C\+\+ compiler, .*; compile=none trains without it$"),
        steps.step(whole=True),
    ):
        steps(nn.Sequential(nn.Linear(5, 7), nn.GELU()), torch.randn(4, 5))


def test_code_of_others_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compilation.os, "getuid", lambda: 4242)
    with pytest.raises(UserError, match=r"compile: .* belongs to somebody else, .* TORCHINDUCTOR_CACHE_DIR="):
        compilation.compiled(nn.Linear(2, 2), "default")


@pytest.mark.parametrize("mode", ["fast", "true", "false", "null", "1"])
def test_a_wrong_mode_is_named_as_it_was_typed(mode: str) -> None:
    message = f"^compile={mode}: must be one of none, default, max; default compiles, none does not$"
    with pytest.raises(UserError, match=message):
        config_of(f"compile={mode}")


@pytest.mark.slow
@mock.patch.dict(os.environ)  # the compiler leaves variables behind, and a path
def test_compiled_twice_or_resumed_it_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real compiler; against the plain network it is the same to rounding, which training then blows up."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    short = ["epochs=3", "prune=none", "data.train_samples=128"]
    for name, stops in {"once": [3], "twice": [3], "parts": [2, 3]}.items():
        (tmp_path / name).mkdir()
        for number, last in enumerate(stops):
            config = config_of(*short, f"resume={'auto' if number else 'never'}")
            stop_after(last, config, tmp_path / name)
    once, *others = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("once", "twice", "parts"))
    for other in others:
        assert_same(other["model"], once["model"])
        assert_same(other["optimizer"], once["optimizer"])
    run = build_run(config_of(*short))
    x, y = next(iter(run.data.train_batches(16, torch.Generator())))
    losses = [nn.functional.cross_entropy(f(x), y) for f in (compilation.compiled(run.model, "default"), run.model)]
    grads = [torch.autograd.grad(loss, list(run.model.parameters())) for loss in losses]
    assert math.isfinite(losses[0].item())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
