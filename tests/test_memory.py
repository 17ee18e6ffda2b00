"""The simulated step against the trainer's own, whose allocations the profiler notes; and what follows from it."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

import morphtrain
from morphtrain.cost import MemoryModel, count_params, estimate_memory, max_batch, memory_model
from morphtrain.cost.throughput import throughput
from morphtrain.model import VGG, MobileNet, ResNet
from morphtrain.morph import ChannelGraph
from morphtrain.prune.reconfigure import reconfigure
from morphtrain.state import Run
from morphtrain.trainer.build import build_run
from morphtrain.trainer.loop import train_epoch

SHAPE = (3, 32, 32)
WITHOUT_MOMENTUM = partial(SGD, lr=0.1)


def model_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def state_bytes(optimizer: Optimizer) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))


def run_of_one_step(batch_size: int, *overrides: str) -> Run:
    data = ["data=synthetic", f"data.train_samples={batch_size}", "data.in_channels=3", "data.image_size=32"]
    config = morphtrain.compose(*data, "tracking=none", "data.val_samples=2", *overrides)
    run = build_run(config)
    run.batch_size = batch_size
    return run


def allocated_peak(run: Run, trace: Path) -> int:
    """Peak bytes in an epoch of one step by torch's allocator, including what was there before, except the data set."""
    train_epoch(run)  # the optimizer has its state now
    before = model_bytes(run.model) + state_bytes(run.optimizer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_epoch(run)
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return before + peak


STEPS = {
    "resnet20": (["model=resnet20"], 32),
    "odd widths": (["model=resnet8", "model.width=7"], 32),
    "resnet20 in bf16": (["model=resnet20", "precision=bf16"], 32),
    "vgg8 with adamw": (["model=vgg8", "model.width=32", "optimizer=adamw"], 32),
    "mobilenet_v2": (["model=mobilenet_v2", "model.width_multiplier=0.25"], 16),
    "weights above all": (["model=alexnet", "optimizer=adamw"], 2),
    "dropout": (["model=vgg8", "model.width=16", "model.dropout=0.5"], 64),
}


@pytest.mark.parametrize("case", STEPS)
def test_the_estimate_is_what_the_trainer_allocates(case: str, tmp_path: Path) -> None:
    overrides, batch_size = STEPS[case]
    run = run_of_one_step(batch_size, *overrides)
    real = allocated_peak(run, tmp_path / "trace.json")
    settings = {"optimizer": run.optimizer, "precision": run.precision.dtype}
    estimate = estimate_memory(run.model, SHAPE, batch_size, **settings)
    assert 0.96 < estimate / real < 1.03


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_estimate_is_what_the_process_takes() -> None:
    """Three networks, dense and pruned, three batch sizes each: resident bytes of fresh processes."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    ratios = {}
    for name in benchmark.NETWORKS:
        for batch_size in benchmark.FEWER.get(name, benchmark.BATCHES):
            for pruned in (False, True):
                sizes = benchmark.measure(name, batch_size, pruned)
                ratios[name, batch_size, pruned] = sizes["predicted"] / sizes["real"]
    assert all(0.95 <= ratio <= 1.10 for ratio in ratios.values()), ratios


def test_the_least_network_is_counted_by_hand() -> None:
    """Weight, momentum and gradient, image, label, and the gradient of the logits.

    A large batch is fullest before it has the weight's gradient: with the logits, their logarithms, and the gradient
    of these (40 bytes a sample each); losses and sums are single numbers.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(1000, 10, bias=False))
    memory = memory_model(model, (1000,), device_type="cuda")
    assert memory.peak(1) == pytest.approx(3 * 40000 + 4000 + 8 + 40, abs=16)
    assert memory.fixed == pytest.approx(2 * 40000, abs=16)
    assert memory.per_sample in (4000 + 8 + 2 * 40, 4000 + 8 + 3 * 40)


NETWORKS = {
    "resnet": lambda: ResNet(blocks=1),
    "vgg": lambda: VGG(depth=8, width=16, dropout=0.3),
    "mobilenet": lambda: MobileNet(version=2, width_multiplier=0.25),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_two_sizes_predict_all_others(name: str) -> None:
    model = NETWORKS[name]()
    memory = memory_model(model, SHAPE)
    assert memory.exact
    for batch_size in (1, 37, 5000):
        assert memory.peak(batch_size) == estimate_memory(model, SHAPE, batch_size)


def test_nothing_of_the_model_is_touched() -> None:
    model = VGG(depth=8, width=8, dropout=0.5).eval()
    model.features.train()
    model.features[0].weight.requires_grad_(False)
    optimizer = AdamW(p for p in model.parameters() if p.requires_grad)
    model(torch.randn(2, *SHAPE)).sum().backward()
    optimizer.step()
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    pointers = [p.data_ptr() for p in model.parameters()]
    states = {id(p): {key: t.clone() for key, t in state.items()} for p, state in optimizer.state.items()}
    random = torch.get_rng_state()
    max_batch(model, SHAPE, 2**30, optimizer=optimizer)
    estimate_memory(model, SHAPE, 3, precision=torch.bfloat16)
    assert all(map(torch.equal, before, (*model.parameters(), *model.buffers())))
    for old, parameter in zip(grads, model.parameters(), strict=True):
        assert (old is None and parameter.grad is None) or torch.equal(old, parameter.grad)
    assert modes == [module.training for module in model.modules()]
    assert pointers == [p.data_ptr() for p in model.parameters()]
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(state[key], old) for key, old in states[id(parameter)].items())
    assert torch.equal(random, torch.get_rng_state())


def test_state_counts_whether_it_is_there_or_not() -> None:
    model = ResNet(blocks=1, width=8)
    weights = 4 * count_params(model)
    fixed = {
        name: memory_model(model, SHAPE, optimizer=optimizer, device_type="cuda").fixed
        for name, optimizer in (("none", WITHOUT_MOMENTUM), ("momentum", partial(SGD, lr=0.1, momentum=0.9)))
    }
    assert fixed["momentum"] - fixed["none"] == weights
    adamw = memory_model(model, SHAPE, optimizer=AdamW, device_type="cuda").fixed
    steps = 4 * len(list(model.parameters()))  # AdamW counts steps per parameter
    assert adamw - fixed["none"] == 2 * weights + steps
    optimizer = AdamW(model.parameters())
    without_state = memory_model(model, SHAPE, optimizer=optimizer)
    model(torch.randn(2, *SHAPE)).sum().backward()
    optimizer.step()
    assert memory_model(model, SHAPE, optimizer=optimizer) == without_state
    assert memory_model(model, SHAPE, optimizer=AdamW) == without_state


def test_shared_and_frozen_parameters_count_for_what_they_are() -> None:
    linear = partial(nn.Linear, bias=False)
    model = nn.Sequential(nn.Flatten(), linear(200, 200), nn.ReLU(), linear(200, 200), nn.ReLU(), linear(200, 10))
    weight, last = 4 * 200 * 200, 4 * 200 * 10
    peaks = [memory_model(model, (200,), device_type="cuda").peak(1)]
    model[3].weight = model[1].weight
    peaks.append(memory_model(model, (200,), device_type="cuda").peak(1))
    model[1].weight.requires_grad_(False)
    peaks.append(memory_model(model, (200,), device_type="cuda").peak(1))
    assert peaks[0] == pytest.approx(3 * (2 * weight + last), abs=5000)  # each with momentum and gradient
    assert peaks[0] - 3 * weight - 5000 < peaks[1] < peaks[0] - weight + 5000  # two gradients until they are summed
    assert peaks[2] == pytest.approx(weight + 3 * last, abs=5000)


def test_sixteen_bits_take_about_half_a_sample() -> None:
    model = ResNet(blocks=2)
    full, half = (memory_model(model, SHAPE, precision=dtype).per_sample for dtype in (None, torch.bfloat16))
    assert 0.45 < half / full < 0.6


@pytest.mark.parametrize("residual", ["union", "gating"])
def test_what_pruning_saves_is_seen(residual: str) -> None:
    model = ResNet(blocks=1)
    before = memory_model(model, SHAPE)
    with torch.no_grad():
        for block in (module for stage in model.stages for module in stage):
            block.branch[0].weight[::2] = 0
            block.branch[3].weight[:, ::2] = 0
            block.branch[1].weight[::2] = 0
            block.branch[1].bias[::2] = 0
    reconfigure(ChannelGraph.trace(model, torch.zeros(1, *SHAPE)), threshold=1e-8, residual=residual)
    after = memory_model(model, SHAPE)
    assert after.per_sample < 0.9 * before.per_sample
    assert after.fixed < before.fixed


LINES = st.tuples(st.integers(0, 10**7), st.integers(1, 10**5))


@given(st.lists(LINES, min_size=1, max_size=4), st.integers(1, 10**9))
def test_the_largest_batch_is_the_last_that_fits(lines: list[tuple[int, int]], budget: int) -> None:
    memory = MemoryModel(tuple(lines), exact=True)
    largest = memory.largest_batch(budget)
    assert largest == 0 or memory.peak(largest) <= budget
    assert memory.peak(largest + 1) > budget


def test_the_answer_fits_and_one_more_does_not() -> None:
    model, budget = ResNet(blocks=1, width=8), 100 * 2**20
    found = max_batch(model, SHAPE, budget)
    assert estimate_memory(model, SHAPE, found) <= budget < estimate_memory(model, SHAPE, found + 1)


def test_where_nothing_fits_the_need_of_one_sample_is_named() -> None:
    model = ResNet(blocks=1)
    needed = estimate_memory(model, SHAPE, 1)
    with pytest.raises(ValueError, match=f"nothing fits {needed - 1} bytes: a step of one sample takes {needed}"):
        max_batch(model, SHAPE, needed - 1)
    assert max_batch(model, SHAPE, needed) == 1


class NormAtOnePosition(nn.Module):
    """Its last batch norm sees one value per sample and channel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 64, 32), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_a_batch_of_one_that_cannot_train_is_no_answer() -> None:
    model = NormAtOnePosition()
    two = estimate_memory(model, SHAPE, 2, optimizer=WITHOUT_MOMENTUM)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        estimate_memory(model, SHAPE, 1, optimizer=WITHOUT_MOMENTUM)
    with pytest.raises(ValueError, match=f"cannot be trained on .*two samples takes {two} bytes, more than {two - 1}"):
        max_batch(model, SHAPE, two - 1, optimizer=WITHOUT_MOMENTUM)
    assert max_batch(model, SHAPE, two, optimizer=WITHOUT_MOMENTUM) == 2


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_none_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size={batch_size}: must be 1 or more"):
        estimate_memory(ResNet(blocks=1), SHAPE, batch_size)


class PieceByPiece(nn.Module):
    """Takes 48 images at a time: what it does depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.classifier = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.classifier(self.convolution(piece).relu().mean((2, 3))) for piece in x.split(48)])


def test_a_network_whose_work_depends_on_the_batch_is_searched() -> None:
    model, budget = PieceByPiece(), 10**7
    assert not memory_model(model, SHAPE).exact
    found = max_batch(model, SHAPE, budget)
    assert estimate_memory(model, SHAPE, found) <= budget < estimate_memory(model, SHAPE, found + 1)


class Undecided(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_a_network_that_decides_by_values_is_refused() -> None:
    with pytest.raises(ValueError, match="asks for values"):
        max_batch(Undecided(4, 3), (4,), 10**9)


def test_speed_is_measured_at_every_size_there_is_time_for() -> None:
    model = ResNet(blocks=1, width=4).eval()
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    rates = throughput(model, SHAPE, [2, 4, 8], seconds=1)
    assert list(rates) == [2, 4, 8]
    assert all(rate > 0 for rate in rates.values())
    assert list(throughput(model, SHAPE, [2, 10**6], seconds=0.2)) == [2]
    assert all(map(torch.equal, before, (*model.parameters(), *model.buffers())))
    assert not model.training


@pytest.mark.gpu
def test_a_verified_batch_has_trained() -> None:
    from morphtrain.cost.verify import verify_batch

    model, budget = ResNet(blocks=3).cuda(), 2**30
    found = verify_batch(model, SHAPE, budget, guess=max_batch(model, SHAPE, budget))
    by_size = {trial.batch_size: trial for trial in found.trials}
    assert by_size[found.batch_size].fits
    assert found.margin_bytes == budget - by_size[found.batch_size].peak_bytes >= 0
    assert any(not trial.fits for trial in found.trials)
    assert found.batch_size <= max_batch(model, SHAPE, budget)
    assert max_batch(model, SHAPE, budget, verified=True) in by_size


def test_only_cuda_verifies() -> None:
    with pytest.raises(ValueError, match="the model is on cpu"):
        max_batch(ResNet(blocks=1), SHAPE, 2**30, verified=True)
