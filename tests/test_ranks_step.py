"""A training step by several processes is that of one process, to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import in_ranks
from torch import nn

import morphtrain
from morphtrain import slices, world
from morphtrain.contracts import Batch
from morphtrain.data import ImageData, Images
from morphtrain.method import Method
from morphtrain.norm.sync import SyncBatchNorm2d
from morphtrain.own_numbers import OwnNumbers
from morphtrain.part_checks import is_divided
from morphtrain.schema import Config
from morphtrain.state import Run, passes
from morphtrain.trainer import begin_epoch, build_run, finish_epoch, start
from morphtrain.trainer.loop import training_steps

CPU = torch.device("cpu")
SAME = (
    *("data=synthetic", "data.val_samples=16", "data.image_size=8", "data.num_classes=4", "data.noise=3"),
    *("batch_policy.batch_size=16", "tracking=none", "device=cpu", "schedule.warmup_epochs=0"),
)
RESNET = ("model=resnet8", "model.width=8")
NO_NORM = ("model=custom", "model._target_=test_ranks_step.small", "optimizer.lr=0.05")
UNEVEN = (*SAME, *NO_NORM, "data.train_samples=49", "epochs=3")  # 16 = 8 + 8 = 6 + 5 + 5, and a last batch of one image
PRUNED = ("prune=prunetrain", "prune.lasso_ratio=0.95", "prune.lasso_ratio_of=loss", "prune.interval=1")


def small(num_classes: int, in_channels: int, dropout: float = 0.0) -> nn.Module:
    """A network that takes any number of images, each of which goes through it by itself."""
    first, second = nn.Conv2d(in_channels, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
    head = nn.Dropout(dropout), nn.Linear(12, num_classes)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


# -- how batches are cut --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("images", [0, 1, 2, 7, 16, 17])
def test_a_batch_is_cut_as_torch_does(size: int, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "members", lambda: size)
    expected = [part.tolist() for part in torch.arange(5, 5 + images).tensor_split(size)]
    found = []
    for rank in range(size):
        monkeypatch.setattr(world, "rank", lambda rank=rank: rank)
        found.append(list(range(100))[slices.own(slice(5, 5 + images))])
    assert found == expected
    assert slices.sizes(images) == list(map(len, expected))


def test_an_epoch_is_cut_into_batches_the_last_of_which_may_be_smaller() -> None:
    rows = torch.arange(13)
    for batch_size in (1, 4, 13, 20):
        assert [rows[batch].tolist() for batch in slices.batches(13, batch_size)] == [
            part.tolist() for part in rows.split(batch_size)
        ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.integers(1, 4), batch=st.integers(1, 12), images=st.integers(1, 30), most=st.none() | st.integers(1, 6))
def test_a_pass_with_a_single_image_is_foreseen(size: int, batch: int, images: int, most: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "members", lambda: size)
        run = object.__new__(Run)
        run.batch_size, run.micro_batch, run.model = batch, most, nn.Identity()
        of_shares = [torch.arange(n).tensor_split(size) for n in (batch, images % batch)]
        parts = [(share, passes(len(shares[0]), most)) for shares in of_shares for share in shares]
        expected = any(len(piece) == 1 for share, number in parts for piece in share.tensor_split(number))
        assert run.leaves_single(images) == expected
        run.model = SyncBatchNorm2d(1)
        pieces = [[share.tensor_split(passes(len(shares[0]), most)) for share in shares] for shares in of_shares]
        expected = any(sum(map(len, at_once)) == 1 for parts in pieces for at_once in zip(*parts, strict=True))
        assert run.leaves_single(images) == expected


def test_numbers_of_ones_own_are_a_stream_that_leaves_the_common_one_alone() -> None:
    numbers, own, common = OwnNumbers(), [], []
    torch.manual_seed(5)
    for seed in (1, 1, 2, 1):
        with numbers.drawn(seed, CPU):
            own.append(torch.rand(3).tolist())
        common += torch.rand(2).tolist()
    assert torch.rand(10, generator=torch.Generator().manual_seed(5))[:8].tolist() == common
    first, second = torch.rand(6, generator=torch.Generator().manual_seed(1)).split(3)
    assert own == [
        first.tolist(),
        second.tolist(),
        torch.rand(3, generator=torch.Generator().manual_seed(2)).tolist(),
        first.tolist(),
    ]


# -- as one process -------------------------------------------------------------------------------------------------


class Scales(Method):
    """Logits times a number of its own, which the optimizer trains."""

    def after_build(self, run: Run) -> None:
        self.scale = nn.Parameter(torch.ones(1))
        run.optimizer.add_param_group({"params": [self.scale], "lr": 0.1})
        run.model.register_forward_hook(lambda model, inputs, logits: logits * self.scale)


class Keeps(Method):
    """Might have changed the number of images."""

    def before_forward(self, run: Run, batch: Batch) -> Batch:
        assert batch[1].dim() == 1
        return batch


@dataclass
class Outcome:
    """What a run has come to: everything that the number of processes must not change."""

    weights: dict[str, torch.Tensor]
    widths: list[tuple[str, dict[str, int]]]
    losses: list[float]
    epochs: list[dict[str, float]]


COMPARED = (
    *("train_loss", "train_accuracy", "val_loss", "val_accuracy"),
    *("learning_rate", "share_trained", "accelerated_batches", "extra_passes"),
)


def in_double(configs: Mapping[str, Config]) -> dict[str, Outcome]:
    """The outcomes of whole runs in double precision."""
    torch.set_default_dtype(torch.double)
    return {name: _outcome(config) for name, config in configs.items()}


def steps(run: Run) -> Iterator[int]:
    with run.clock.timed("epoch_seconds"):
        yield from training_steps(run)


def _outcome(config: Config) -> Outcome:
    run, losses = build_run(config), []
    start(run)
    while run.epoch < config.epochs:
        begin_epoch(run)
        losses += [run.loss.item() for _ in steps(run)]
        finish_epoch(run)
    assert all(parameter.dtype is torch.double for parameter in run.model.parameters())
    weights = {name: parameter.detach() for name, parameter in run.model.named_parameters()}
    changes = [(change["event"], change["widths"]) for change in run.changes]
    records = [{key: record[key] for key in COMPARED if key in record} for record in run.history]
    return Outcome(weights, changes, losses, records)


def assert_alike(found: Outcome, expected: Outcome, within: float) -> None:
    assert found.widths == expected.widths
    assert found.weights.keys() == expected.weights.keys()
    off = max((found.weights[name] - value).abs().max().item() for name, value in expected.weights.items())
    print(f"weights differ by at most {off:.2g}")
    assert off < within
    assert found.losses == pytest.approx(expected.losses, rel=within)
    for record, wanted in zip(found.epochs, expected.epochs, strict=True):
        assert record == pytest.approx(wanted, rel=1e-5)


ONE = "batch_policy.max_micro_batch=1"
CHANGED = {
    # Sixty steps, in which the network is pruned and grows. A process's batch norm is a chunk of ghost norm.
    "pruned and grown": (
        *(*SAME, *RESNET, *PRUNED, "data.train_samples=160", "epochs=6", "prune.start_epoch=2", "optimizer.lr=0.05"),
        *("norm=ghost", "norm.ghost_batch_size=8", "grow=wider", "grow.at_epochs=[3]", "grow.factor=1.5"),
    ),
}
ALIKE = {
    "clipped, in passes": (*UNEVEN, "clip_norm=0.1", "batch_policy.max_micro_batch=3"),
    "lars": (*UNEVEN, "optimizer=lars", "optimizer.lr=1"),
    "adamw": (*UNEVEN, "optimizer=adamw", "optimizer.lr=0.001"),
    "penalty": (*UNEVEN, *PRUNED, "prune.update=subgradient", "prune.start_epoch=1"),
    "infobatch": (*UNEVEN, "data.infobatch=0.5", "data.infobatch_until=0.9", "epochs=5"),
    "isgd": (
        *(*SAME, "model=alexnet", "model.dropout=null", "model.batch_norm=false", "data.train_samples=49", "epochs=3"),
        *("data.order=cycle", "data.noise=30", "optimizer=isgd", "optimizer.sigmas=0", "optimizer.zeta=3"),
        *("optimizer.lr=0.005", "schedule=constant"),
    ),
    "weight norm": (*SAME, *RESNET, "norm=weight", "data.train_samples=47", "epochs=2", "optimizer.lr=0.01"),
    "top1": (*UNEVEN, "gradient=approximate", "gradient.kind=top1", "gradient.every=1"),
    "smaller images": (*UNEVEN, "data.progressive=0.5"),
    # Of seven images, one process has four passes and the other three: so do those that settle batch norm.
    "passes of one": (*SAME, *RESNET, "data.train_samples=28", "epochs=2", "batch_policy.batch_size=7", ONE),
    "mixed images": (*UNEVEN, "data.mixup=0.4", "loss.label_smoothing=0.1"),
    "mixed images after a method": (*UNEVEN, "data.cutmix=1", "methods=[{_target_: test_ranks_step.Keeps}]"),
    "a parameter of a method": (*UNEVEN, "methods=[{_target_: test_ranks_step.Scales}]"),
}
FEW = {  # images: fewer than processes in some batches, or in all of them
    "one or two": (*UNEVEN, "batch_policy.batch_size=2", "data.train_samples=9", "clip_norm=1"),
    "mixed images of one or two": (
        *(*UNEVEN, "batch_policy.batch_size=2", "data.train_samples=9", "data.mixup=0.4", "data.cutmix=1"),
    ),
    "a batch policy": (*UNEVEN, "batch_policy=adabatch", "batch_policy.batch_size=4", "batch_policy.every=1"),
}


@pytest.fixture(scope="module")
def configs() -> dict[str, Config]:
    return {name: morphtrain.compose(*keys) for name, keys in {**CHANGED, **ALIKE, **FEW}.items()}


@pytest.fixture(scope="module")
def by_one(configs: dict[str, Config]) -> dict[str, Outcome]:
    return in_ranks(1, in_double, configs)[0]


@pytest.fixture(scope="module")
def by_two(configs: dict[str, Config]) -> list[dict[str, Outcome]]:
    return in_ranks(2, in_double, {name: configs[name] for name in (*CHANGED, *ALIKE)})


@pytest.fixture(scope="module")
def by_three(configs: dict[str, Config]) -> list[dict[str, Outcome]]:
    return in_ranks(3, in_double, {name: configs[name] for name in (*FEW, "clipped, in passes", "infobatch")})


@pytest.mark.parametrize("name", [*CHANGED, *ALIKE])
def test_two_processes_train_as_one(name: str, by_one: dict[str, Outcome], by_two: list[dict[str, Outcome]]) -> None:
    for found in by_two:
        assert_alike(found[name], by_one[name], within=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FEW, "clipped, in passes", "infobatch"])
def test_three_processes_train_as_one_even_if_some_have_no_images(
    name: str, by_one: dict[str, Outcome], by_three: list[dict[str, Outcome]]
) -> None:
    for found in by_three:
        assert_alike(found[name], by_one[name], within=1e-8)


def test_what_is_compared_happens(by_one: dict[str, Outcome]) -> None:
    changed = by_one["pruned and grown"]
    events = " ".join(event for event, _ in changed.widths)
    assert len(changed.losses) == 60 and "removed" in events and "widened" in events, events
    assert min(record["share_trained"] for record in by_one["infobatch"].epochs) < 1
    assert max(record["accelerated_batches"] for record in by_one["isgd"].epochs) > 0
    for outcome in by_one.values():
        assert outcome.losses[0] != outcome.losses[-1]


# -- what data make of slices ---------------------------------------------------------------------------------------


class Whole:
    """Data of the user's own, of which one cannot ask for slices."""

    advice, num_classes, input_shape = "", 4, (1, 8, 8)

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        images = Images(torch.randn(21, 1, 8, 8, generator=draw), torch.arange(21) % 4)
        self.of = ImageData(images, images, 4)
        self.train, self.val, self.val_batches = self.of.train, self.of.val, self.of.val_batches

    def to(self, *_: Any) -> Whole:
        return self

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        return self.of.train_batches(batch_size, generator)


def whole():  # type: ignore[no-untyped-def]  # which says nothing of a class that sets its attributes when it is made
    return Whole()


class Another(ImageData):
    """A user's own order, which a base class that can be asked for slices knows nothing of."""

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        yield from reversed(list(super().train_batches(batch_size, generator)))


@pytest.mark.parametrize("kind", ["tensors", "bytes", "files"])
def test_slices_of_batches_are_those_of_whole_batches(kind: str, tmp_path: Path) -> None:
    from test_infobatch import DATA

    data, rows = DATA[kind](tmp_path), torch.tensor([6, 1, 3, 2, 7, 0, 5])
    seeded = torch.Generator().manual_seed
    assert is_divided(data)
    images, labels = (torch.cat(parts) for parts in zip(*data.train_batches_of(rows, 3, seeded(1)), strict=True))
    edges = list(accumulate((0, 2, 0, 1, 3)))
    parts = [slice(a, b) for a, b in pairwise(edges)]
    found = list(data.train_slices_of(rows, parts, seeded(1)))
    for part, (x, y) in zip(parts, found, strict=True):
        assert torch.equal(y, labels[part])
        torch.testing.assert_close(x, images[part], rtol=0, atol=1e-6)
        assert x.shape[1:] == images.shape[1:] and x.dtype == images.dtype


def test_data_whose_order_a_base_class_does_not_know_are_not_asked_for_slices() -> None:
    data = Whole().of
    assert is_divided(data)
    assert not is_divided(Another(data.train, data.val, 4))
    assert not is_divided(Whole())
