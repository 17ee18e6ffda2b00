"""What processes of a run have alike: buffers, evaluation, records and decisions; and a difference stops the run."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from conftest import SMALL
from ranks import in_ranks
from torch import nn
from whole_runs import epoch

import morphtrain
from morphtrain import slices, world
from morphtrain.batch_policy import fill_memory
from morphtrain.cost import latency
from morphtrain.cost.latency import Timing, measured_cost
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph
from morphtrain.processes.digest import check_replicas, digests
from morphtrain.settling import agree_buffers, settle, trained_norms
from morphtrain.state import SETTLING_BATCHES, Run
from morphtrain.timing.clock import Clock
from morphtrain.trainer import auto, begin_epoch, build_run, start, train_epoch
from morphtrain.trainer.auto import Choice
from morphtrain.trainer.loop import evaluate

QUICK = (*SMALL, "tracking=none", "device=cpu", "model.width=4")
UNPRUNED = tuple(override for override in QUICK if not override.startswith("prune"))


def built(*overrides: str, base: tuple[str, ...] = QUICK) -> Run:
    run = build_run(morphtrain.compose(*base, *overrides))
    start(run)
    return run


class Slow(Method):
    """Rank 1 needs longer for each batch, and finds other numbers of its own."""

    def before_forward(self, run: Run, batch: Any) -> None:
        time.sleep(0.01 * world.rank())

    def measure(self, run: Run) -> dict[str, float]:
        return {"own": float(world.rank())}


def epochs(norm: str, batch_size: int, images: int) -> dict[str, Any]:
    """Two epochs, what is recorded of them, and how far the last evaluation is from one of all images at once."""
    slow = "methods=[{_target_: test_replicas.Slow}]"
    sizes = f"batch_policy.batch_size={batch_size}", f"data.train_samples={images}"
    run = built(f"norm={norm}", *sizes, slow, "epochs=2")
    records = [epoch(run) for _ in range(2)]
    check_replicas(run)
    with world.alone():
        whole = evaluate(run) if world.is_main() else None
    return {
        "records": records,
        "whole": whole,
        "digests": digests(run),
    }


@pytest.mark.parametrize(("size", "norm", "batch_size", "images"), [(2, "batch", 25, 50), (3, "sync", 2, 16)])
def test_processes_have_the_same_records_buffers_and_evaluation(
    size: int, norm: str, batch_size: int, images: int
) -> None:
    """Uneven shares of batches; of two images, one process has none."""
    first, *others = in_ranks(size, epochs, norm, batch_size, images)
    for other in others:
        assert other["records"] == first["records"]
        assert other["digests"] == first["digests"]  # of the settled buffers, too
    for record in first["records"]:
        assert record["own"] == 0 and record["processes"] == size
        assert record["epoch_seconds"] >= 0.01 * images / batch_size * (size - 1)
        assert 0 < record["comm_seconds"] < record["epoch_seconds"]
        assert record["samples_per_second"] == images / record["epoch_seconds"]
    loss, accuracy = first["whole"]
    assert first["records"][-1]["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert first["records"][-1]["val_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    before, last = first["records"]
    sent, gradients = last["comm_bytes"], 4 * before["params"] * -(-images // batch_size)
    assert gradients < sent < (1.1 if norm == "batch" else 3) * gradients


def test_one_process_records_nothing_of_the_kind() -> None:
    run = built("epochs=1")
    assert not {"comm_seconds", "comm_bytes", "processes"} & epoch(run).keys()
    with pytest.raises(UserError, match="objective=comm_bytes: one process sends nothing"):
        built("objective=[comm_bytes]")


def settled() -> list[float]:
    """Errors of settled statistics, by norm and statistic, against chunks that one process settles with."""
    run = built("batch_policy.batch_size=7", "data.train_samples=64")
    begin_epoch(run)
    train_epoch(run)
    expected = copy.deepcopy(run.model)
    run.settle()
    found = [b for name, b in run.model.named_buffers() if "running" in name]
    with world.alone():
        batches = [images for images, _ in run.all_batches()][: min(SETTLING_BATCHES, 64 // 7)]
        means: list[torch.Tensor] = []
        counts = slices.sizes(7, world.members())
        chunks = [batch.split(counts) for batch in batches]
        for rank, count in enumerate(counts):  # as if each were the only process
            model = copy.deepcopy(expected).train()
            settle(model, trained_norms(model), [chunk[rank] for chunk in chunks])
            own = torch.cat([b.flatten() for name, b in model.named_buffers() if "running" in name])
            means.append(own.double() * count / 7)
    mean = torch.stack(means).sum(0)
    return [((torch.cat([b.flatten() for b in found]).double() - mean) / mean.abs().clamp(min=1)).abs().max().item()]


def test_settled_statistics_are_the_mean_over_all_images() -> None:
    assert max(error for errors in in_ranks(3, settled) for error in errors) < 1e-6


def agreed() -> dict[str, list[Any]]:
    """Buffers of a model that differ, are equal, or are no numbers in one process."""
    rank = world.rank()
    model = nn.Module()
    for name, values in {
        "mean": [float(rank), 1 / 3],
        "sixteen": [1.5 + rank],
        "equal": [0.1, float("inf"), float("-inf"), 1e-42],
        "none": [float("nan") if rank == 2 else 4.0],
    }.items():
        dtype = torch.bfloat16 if name == "sixteen" else torch.float32
        model.register_buffer(name, torch.tensor(values, dtype=dtype))
    model.register_buffer("count", torch.tensor(7 + rank))
    model.register_buffer("mask", torch.tensor([rank == 0, True]))
    agree_buffers(model, [3, 1, 0][rank])
    return {name: buffer.flatten().tolist() for name, buffer in model.named_buffers()}


def test_buffers_become_their_mean_by_images_and_what_is_equal_stays() -> None:
    for found in in_ranks(3, agreed):
        assert found["mean"] == torch.tensor([0.25, 1 / 3]).tolist()
        assert found["equal"] == torch.tensor([0.1, float("inf"), float("-inf"), 1e-42]).tolist()
        assert (found["sixteen"], found["none"]) == ([1.75], [4.0])
        assert (found["count"], found["mask"]) == ([7], [True, True])


def spoilt() -> list[str]:
    """What this process is told of each kind of difference, which rank 1 makes and takes back."""
    run = built("prune=prunetrain", "prune.start_epoch=9", "epochs=3", "data.infobatch=0.5")
    epoch(run)
    check_replicas(run)
    run.methods["prune"].state_dict()
    said: list[str] = []

    def told(tensor: torch.Tensor) -> None:
        """Change the last bit of a number of it."""
        bits = tensor.detach().view(torch.int32 if tensor.element_size() == 4 else torch.int64).reshape(-1)
        bits[-1] ^= world.rank() == 1
        said.append(difference(run))
        bits[-1] ^= world.rank() == 1

    weight = run.model.stem[0].weight
    own = nn.Parameter(torch.ones(1))
    run.optimizer.add_param_group({"params": [own]})
    momentum = run.optimizer.state[weight]["momentum_buffer"]
    for tensor in (weight, run.model.stem[1].running_var, momentum, own, run.infobatch.scores):
        told(tensor)
    for owner, name in ((run, "batch_size"), (run, "lr_factor"), (run.methods["prune"], "penalty_weight")):
        value = getattr(owner, name)
        setattr(owner, name, value + (world.rank() == 1))
        said.append(difference(run))
        setattr(owner, name, value)
    weight.requires_grad_(world.rank() != 1)
    said.append(difference(run))
    weight.requires_grad_(True)
    check_replicas(run)
    if world.rank() == 1:
        run.graph.reindex(run.graph.spaces[0], range(run.graph.spaces[0].size - 1), run.optimizer)
    return [*said, difference(run)]


def difference(run: Run) -> str:
    with pytest.raises(UserError, match="after epoch 1 the processes have different networks: ") as raised:
        check_replicas(run)
    return str(raised.value).partition(": ")[2]


def test_a_difference_stops_all_and_is_named() -> None:
    """A single bit, anywhere, in one process of three."""
    first, *others = in_ranks(3, spoilt)
    assert others == [first, first]
    names = [
        "parameter stem.0.weight",
        "buffer stem.1.running_var",
        "optimizer state of stem.0.weight: momentum_buffer",
        "parameter optimizer group 2, 0",
        "state of infobatch: scores",
    ]
    names += ["run.batch_size", "run.lr_factor", "state of prune: strength", "requires_grad of stem.0.weight"]
    expected = [f"{name} is another one in rank 1 than in rank 0" for name in names]
    assert [line.partition(";")[0] for line in first[:-1]] == expected
    assert first[-1].startswith("parameter ") and "morphtrain.world.agree" in first[-1]


class Stops(Method):
    """Rank 0 alone finds after the second epoch that it is enough; rank 1 after the first, which does not count."""

    def measure(self, run: Run) -> None:
        run.stopped = run.stopped or (run.epoch == 2 if world.is_main() else run.epoch == 1)


def stopping() -> list[tuple[int, bool, bool]]:
    run = built("methods=[{_target_: test_replicas.Stops}]", "epochs=3", base=UNPRUNED)
    found = []
    while not run.ended:
        record = epoch(run)
        found.append((run.epoch, run.stopped, "test_accuracy" in record))
    return found


def test_the_main_process_decides_whether_a_method_ends_the_run() -> None:
    first, second = in_ranks(2, stopping)
    assert first == second == [(1, False, False), (2, True, True)]


def edges() -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of two blocks in this process, and what all agree on: rank 1 is late, and slow in the second block."""
    clock = Clock(torch.device("cpu"))
    time.sleep(0.2 * world.rank())
    with clock.timed("morph_seconds"):
        pass
    with clock.timed("epoch_seconds"):
        time.sleep(0.2 * world.rank())
    own = dict(clock.seconds)
    clock.agree()
    return own, clock.seconds


def test_a_block_begins_together_and_takes_as_long_as_in_the_slowest_process() -> None:
    (first, agreed_by_first), (second, agreed_by_second) = in_ranks(2, edges)
    assert max(first["morph_seconds"], second["morph_seconds"]) < 0.15
    assert first["epoch_seconds"] < 0.15 and second["epoch_seconds"] >= 0.2
    assert agreed_by_first == agreed_by_second
    assert agreed_by_first["epoch_seconds"] == second["epoch_seconds"]


def measured() -> dict[str, Any]:
    """What follows from measurements that are others in each process, and from one that fails in rank 0 alone."""
    rank = world.rank()
    patch = pytest.MonkeyPatch()
    choices = {Choice(*kind): 1.0 for kind in (("contiguous", "o0"), ("channels_last", "o0"))}

    def step_seconds(run: Run) -> dict[Choice, float]:
        assert world.is_main() and world.size() == 1
        return {**choices, Choice("channels_last", "o0"): 0.5 + rank}

    def layers(steps: Any, places: Any, limit: float) -> Any:
        assert world.is_main() and world.size() == 1
        return {place: Timing(0.01 * (1 + rank + index), True) for index, place in enumerate(places)}, False

    patch.setattr(auto, "step_seconds", step_seconds)
    patch.setattr(latency, "_measured", layers)
    patch.setattr(latency.latency_file, "read", lambda facts: {})
    patch.setattr(fill_memory, "usable_bytes", lambda config, device: float(2**28 - rank * 2**20))
    budget = "batch_policy=fill_memory", "batch_policy.budget=1GiB"
    run = built("memory_format=auto", *budget, base=UNPRUNED)
    graph = ChannelGraph.trace(ResNet(blocks=1, width=4), torch.zeros(1, 3, 8, 8))
    found = {
        "format": run.chosen,
        "budget": run.methods["batch_policy"].budget,
        "cost": measured_cost(graph, 8)(),
    }
    patch.setattr(auto, "step_seconds", lambda run: (_ for _ in ()).throw(UserError("memory_format=auto: only here")))
    with pytest.raises(UserError, match="memory_format=auto: only here"):
        built("memory_format=auto", base=UNPRUNED)
    patch.undo()
    return found


def test_what_is_measured_is_decided_by_one_or_by_the_least() -> None:
    first, second = in_ranks(2, measured)
    assert first == second
    assert first["format"] == {"memory_format": "channels_last"}
    assert first["budget"] == 2**28 - 2**20
