"""Batch sizes over a run: what they become, how memory and learning rate follow, and that resuming repeats it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_resume import assert_same, contents
from torch import nn

import morphtrain
from morphtrain import schema
from morphtrain.batch_policy import fill_memory
from morphtrain.batch_policy.learning_rate import grow
from morphtrain.batch_policy.sizes import without_single
from morphtrain.cost import MemoryModel, count_params
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.ramp import Ramp
from morphtrain.state import Run
from morphtrain.trainer import checkpoint, train
from morphtrain.trainer.build import build_run

ANY_POLICY = [override for override in SMALL if not override.startswith("batch_policy.")]


def config_of(*overrides: str) -> schema.Config:
    return morphtrain.compose(*ANY_POLICY, "tracking=none", "device=cpu", *overrides)


WRONG = {
    "ghosts of none": (["norm=ghost", "norm.ghost_batch_size=0"], "norm.ghost_batch_size=0: must be 1 or more"),
    "trust": (["optimizer=lars", "optimizer.trust_coefficient=0"], "optimizer.trust_coefficient=0.0: must be above 0"),
    "nesterov": (
        ["optimizer=lars", "optimizer.nesterov=true", "optimizer.momentum=0"],
        "optimizer.nesterov=true: must be false",
    ),
    "clipping to nothing": (["clip_norm=0"], "clip_norm=0.0: must be above 0, or null"),
    "no passes": (["batch_policy.max_micro_batch=0"], "batch_policy.max_micro_batch=0: must be 1 or more"),
    "factor": (["batch_policy=adabatch", "batch_policy.factor=1"], "batch_policy.factor=1: must be 2 or more"),
    "never": (["batch_policy=adabatch", "batch_policy.every=0"], "batch_policy.every=0: must be 1 or more"),
    "limit": (
        ["batch_policy=adabatch", "batch_policy.max_batch_size=8"],
        "batch_policy.max_batch_size=8: must be batch_policy.batch_size=32 or more",
    ),
    "scaling": (
        ["batch_policy=fill_memory", "batch_policy.lr_scaling=cubic"],
        "batch_policy.lr_scaling=cubic: must be one of linear, sqrt, none",
    ),
    "warm-up": (["batch_policy=adabatch", "batch_policy.warmup_epochs=-1"], "batch_policy.warmup_epochs=-1.0: must be"),
    "budget": (["batch_policy=fill_memory", "batch_policy.budget=much"], "batch_policy.budget=much: must be .*11GiB"),
    "overhead": (
        ["batch_policy=fill_memory", "batch_policy.budget=1MiB", "batch_policy.overhead=2MiB"],
        "batch_policy.overhead=2MiB: must be less than batch_policy.budget",
    ),
    "all of it": (
        ["batch_policy=fill_memory", "batch_policy.overhead=100%"],
        "batch_policy.overhead=100%: must be less than batch_policy.budget",
    ),
    "no budget": (
        ["batch_policy=fill_memory", "batch_policy.budget=0"],
        "batch_policy.budget=0: must be above 0, or null",
    ),
    "multiple": (["batch_policy=fill_memory", "batch_policy.multiple_of=0"], "batch_policy.multiple_of=0: must be 1"),
    "shrinking": (["batch_policy=fill_memory", "batch_policy.max_factor=1"], "batch_policy.max_factor=1.0: must be ab"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_key_is_named(case: str) -> None:
    overrides, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        config_of(*overrides)


# -- the learning rate -----------------------------------------------------------------------------------------


def test_a_ramp_is_linear_and_turns_where_it_is() -> None:
    assert [Ramp().at(x) for x in (0, 5)] == [1, 1]
    up = Ramp().turned(3.0, 4.0, 2.0)
    assert [up.at(x) for x in (3, 3.5, 4, 5, 9)] == [1, 1.75, 2.5, 4, 4]
    again = up.turned(4.0, 2.0, 0.5)
    assert [again.at(x) for x in (4, 4.25, 4.5, 9)] == [2.5, 2.25, 2, 2]
    assert up.turned(4.0, 7.0, 0.0).at(4.0) == 7


@pytest.mark.parametrize(("lr_scaling", "factor"), [("linear", 6), ("sqrt", 6**0.5), ("none", 1)])
def test_the_learning_rate_follows_from_the_first_batch_size(lr_scaling: str, factor: float) -> None:
    run = small_run()
    run.progress = 2.0
    for batch_size in (20, 60):  # two jumps equal one
        grow(run, batch_size, 10, lr_scaling, 1.0, "why not")
    assert run.batch_size == 60
    assert run.lr_scale.at(3.0) == pytest.approx(factor)
    assert run.lr_scale.at(2.5) == pytest.approx((1 + factor) / 2)
    assert run.lr_scale.at(2.0) == 1


# -- adabatch --------------------------------------------------------------------------------------------------

ADABATCH = (
    "batch_policy=adabatch",
    "batch_policy.batch_size=8",
    "batch_policy.every=2",
    "batch_policy.max_batch_size=24",
    "batch_policy.lr_scaling=linear",
    "batch_policy.warmup_epochs=0.5",
    "epochs=7",
    "prune=none",
)
NO_PRUNE = [o for o in ANY_POLICY if not o.startswith("prune")]


def test_adabatch_multiplies_up_to_its_limit(tmp_path: Path) -> None:
    config = morphtrain.compose(*NO_PRUNE, "tracking=none", "device=cpu", *ADABATCH)
    train(config, tmp_path, {})
    history = read_records(tmp_path)
    sizes = [record["batch_size"] for record in history]
    assert sizes == [8, 8, 16, 16, 24, 24, 24]
    schedule = build_run(config).schedule
    for epoch, (record, size) in enumerate(zip(history, sizes, strict=True), 1):
        last = (256 - 1) % size + 1  # images in the epoch's last batch
        expected = config.optimizer.lr * schedule(epoch - last / 2 / 256) * size / 8
        assert record["learning_rate"] == pytest.approx(expected)


@given(batch_size=st.integers(1, 300), samples=st.integers(2, 3000), multiple=st.sampled_from([1, 4, 8]))
@settings(derandomize=True)
def test_no_size_leaves_a_single_image(batch_size: int, samples: int, multiple: int) -> None:
    size = without_single(batch_size, samples, multiple)
    assert size % multiple == 0
    assert 0 <= size <= batch_size
    if size > multiple:
        assert samples % size != 1
    larger = range(size + multiple, batch_size + 1, multiple)
    assert all(samples % candidate == 1 for candidate in larger)


# -- fill_memory -----------------------------------------------------------------------------------------------


def stand_in(model: nn.Module, input_shape: object, **how: object) -> MemoryModel:
    """A memory model that gets smaller with the network: 12 bytes a parameter, and 4 for every image."""
    params = count_params(model)
    return MemoryModel(((12.0 * params, 4.0 * params),), exact=True)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_memory, "memory_model", stand_in)


def small_run(*overrides: str) -> Run:
    return build_run(config_of("data.train_samples=1001", "epochs=9", *overrides))


shared_run = functools.cache(small_run)  # hypothesis asks for it often


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    fixed=st.integers(0, 500),
    per_sample=st.floats(0.5, 20),
    budget=st.integers(1, 3000),
    start=st.integers(2, 200),
    multiple=st.sampled_from([1, 8, 32]),
    max_factor=st.sampled_from([1.5, 2.0, 100.0]),
)
def test_fill_memory_takes_the_most_that_is_allowed(fixed, per_sample, budget, start, multiple, max_factor) -> None:
    run = shared_run()
    run.batch_size, run.micro_batch, run.lr_scale, run.epoch, run.change = 0, None, Ramp(), 0, ""
    assume(1001 % start != 1)
    policy = fill_memory.build(
        schema.batch_policy.FillMemory("fill_memory", start, budget, 0, multiple, max_factor, "linear", 0.0)
    )
    with pytest.MonkeyPatch.context() as patch:
        facts = MemoryModel(((float(fixed), per_sample),), exact=True)
        patch.setattr(fill_memory, "memory_model", lambda *args, **how: facts)
        if fixed + per_sample > budget:
            with pytest.raises(UserError, match=f"batch_policy.budget={budget}: not even one image fits"):
                policy.before_training(run)
            return
        policy.before_training(run)
        in_one_pass = fixed + start * per_sample <= budget
        assert run.batch_size == start
        assert (run.micro_batch is None) == in_one_pass
        if not in_one_pass:
            assert fixed + run.micro_batch * per_sample <= budget < fixed + (run.micro_batch + 1) * per_sample
        run.epoch = 3
        policy.after_epoch(run)
        assert run.batch_size == start, "without a change of structure nothing happens"
        run.change = "pruned"
        policy.after_epoch(run)

    def allowed(size: int) -> bool:
        within = fixed + size * per_sample <= budget and size <= start * max_factor and size <= 100
        return size > start and within and size % multiple == 0 and 1001 % size != 1

    best = max(filter(allowed, range(1, 1002)), default=start)
    assert run.batch_size == best
    assert run.lr_scale.at(0.0) == pytest.approx(best / start)
    assert (run.micro_batch is None) == in_one_pass


def test_a_grown_network_that_no_longer_fits_goes_in_passes(memory: None, caplog: pytest.LogCaptureFixture) -> None:
    run = small_run()
    params = count_params(run.model)
    policy = fill_memory.build(
        schema.batch_policy.FillMemory("fill_memory", 32, 12 * params + 4 * params * 40, 0, 8, 2.0, "linear", 0.0)
    )
    policy.before_training(run)
    assert run.micro_batch is None
    space = run.graph.spaces[0]
    run.graph.reindex(space, [*range(space.size), *range(space.size)])
    run.change = "grown"
    with caplog.at_level(logging.WARNING):
        policy.after_epoch(run)
    assert run.batch_size == 32
    assert 1 <= run.micro_batch < 32
    assert f"passes of at most {run.micro_batch} images" in caplog.text


def test_a_batch_goes_in_passes_in_fewer_processes_than_before(memory: None) -> None:
    run = small_run()
    params = count_params(run.model)
    budget = 12 * params + 4 * params * 20
    policy = fill_memory.build(schema.batch_policy.FillMemory("fill_memory", 32, budget, 0, 8, 2.0, "linear", 0.0))
    run.epoch, run.batch_size, run.micro_batch, run.history = 2, 32, None, [{"processes": 2}]
    policy.before_training(run)
    assert run.batch_size == 32 and run.micro_batch is not None
    fits, run.micro_batch, run.history = run.micro_batch, None, [{}]
    policy.before_training(run)
    assert 16 <= fits < 32 and run.micro_batch is None, "in as many as before nothing changes"


def test_what_a_cuda_device_has_free_is_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)

    def usable(device: str, budget: str | None, overhead: object) -> float:
        config = schema.batch_policy.FillMemory("fill_memory", 32, budget, overhead, 8, 2.0, "linear", 0.0)
        return fill_memory.usable_bytes(config, torch.device(device))

    assert usable("cuda", None, 0) == 750
    assert usable("cuda", None, "20%") == 600
    assert usable("cuda", "1KiB", "24") == 1000
    assert usable("cpu", "1KiB", 0.25) == 768
    with pytest.raises(UserError, match=r"batch_policy\.budget=null"):
        usable("cpu", None, 0)


FILL = (
    "batch_policy=fill_memory",
    "batch_policy.batch_size=16",
    "batch_policy.max_factor=1.5",
    "batch_policy.multiple_of=2",
    "batch_policy.overhead=0",
    "batch_policy.warmup_epochs=1.5",
)


@pytest.mark.parametrize("share", [0.75, 1.5], ids=["in passes", "at once"])
def test_a_pruned_network_gets_larger_batches_and_resumes_to_the_same(
    share: float, memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dense = count_params(build_run(config_of()).model)
    budget = int(12 * dense + share * 16 * 4 * dense)
    config = config_of(*FILL, f"batch_policy.budget={budget}")
    once, twice = tmp_path / "once", tmp_path / "twice"
    for directory in (once, twice):
        directory.mkdir()
    with caplog.at_level(logging.INFO):
        train(config, once, {})
    expected = contents(once / "last.pt")
    history = expected["facts"]["history"]
    sizes = [record["batch_size"] for record in history]
    assert sizes == sorted(sizes)
    assert sizes[0] == 16 < sizes[-1] <= 25
    assert expected["facts"]["micro_batch"] is None
    assert ("passes of at most 12 images" in caplog.text) == (share < 1)
    assert "batch size 16 -> " in caplog.text
    assert "an image, of" in caplog.text
    for record, after in itertools.pairwise(history):
        if after["batch_size"] > record["batch_size"]:
            assert after["params"] < history[0]["params"], "grown before there was anything to gain"

    save, saved = checkpoint.save, []

    def interrupted(run: Run, directory: Path, tracking_id: str | None) -> None:
        save(run, directory, tracking_id)
        saved.append(run.batch_size)
        if len(saved) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, twice, {})
    train(dataclasses.replace(config, resume="auto"), twice, {})
    assert_same(contents(twice / "last.pt"), expected)
