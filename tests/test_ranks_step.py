"""A training step by several processes: that of one process to rounding, and to the bit the same in all of them."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import in_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import morphtrain
from morphtrain import compilation, slices, world
from morphtrain.contracts import Batch
from morphtrain.data import ImageData, Images
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.norm.sync import SyncBatchNorm2d
from morphtrain.own_numbers import OwnNumbers
from morphtrain.part_checks import is_divided
from morphtrain.precision import Precision
from morphtrain.schema import Config
from morphtrain.state import Run, passes
from morphtrain.trainer import auto, begin_epoch, build_run, finish_epoch, start
from morphtrain.trainer.loop import training_steps
from morphtrain.trainer.share import training_shares

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
    assert slices.shares(images) == list(map(len, expected))


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


# -- the same in all processes --------------------------------------------------------------------------------------


def digest(run: Run) -> str:
    """Of all weights, and of what the optimizer keeps."""
    found = hashlib.sha256()
    for leaf in tree_leaves([list(run.model.parameters()), run.optimizer.state_dict()]):
        if isinstance(leaf, torch.Tensor):
            found.update(leaf.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def followed(config: Config, epochs: int) -> list[Any]:
    """What a run is after every step and every change."""
    run, noted = build_run(config), []
    start(run)
    noted.append(digest(run))
    for _ in range(epochs):
        begin_epoch(run)
        for images in steps(run):
            noted.append((digest(run), run.loss.item(), run.progress, images, run.precision.state_dict()))
        finish_epoch(run)
        widths = {space.name: space.size for space in run.graph.spaces}
        noted.append((digest(run), run.train_loss, run.train_accuracy, run.change, widths, run.batch_size))
    return noted


def replicas(configs: Sequence[Config]) -> list[Any]:
    auto.MOST_ROUNDS = auto.LEAST_ROUNDS
    return [followed(config, epochs=2) for config in configs]


def as_they_are() -> Iterator[tuple[str, list[Config]]]:
    """Configs that have every option of every group, and then those that have all pairs of them."""
    from test_pairs import FACTORS, ROWS, config_of, covering, excluded

    methods = morphtrain.compose("methods=[{_target_: test_pairs.Cut}]").methods
    for name, rows in (("options", covering(FACTORS, excluded, strength=1)), ("pairs", ROWS)):
        yield name, [replace(config_of(row), methods=methods) for row in rows]


def assert_same_everywhere(configs: Sequence[Config], found: Sequence[Sequence[Any]]) -> None:
    for number, config in enumerate(configs):
        first, *others = (of_rank[number] for of_rank in found)
        for other in others:
            assert other == first, config
        assert first[0] != first[1][0] and "cut" in str(first), config


def test_with_every_option_the_processes_have_the_same_bits() -> None:
    configs = dict(as_they_are())["options"]
    print(len(configs), "runs")
    assert_same_everywhere(configs, in_ranks(2, replicas, configs, timeout=120))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_with_every_two_options_the_processes_have_the_same_bits(size: int) -> None:
    configs = dict(as_they_are())["pairs"]
    for part in (configs[i : i + 20] for i in range(0, len(configs), 20)):
        assert_same_everywhere(part, in_ranks(size, replicas, part, timeout=900))


def compiled(config: Config) -> list[Any]:
    compilation.BACKEND = "eager"
    return followed(config, epochs=4)


@pytest.mark.slow
def test_compiled_the_processes_decide_alike_whatever_shares_they_have() -> None:
    keys = (*SAME, *RESNET, "data.train_samples=340", "batch_policy=adabatch", "batch_policy.batch_size=17", "epochs=5")
    more = ("batch_policy.every=2", "batch_policy.factor=2", "batch_policy.max_batch_size=34", "compile=default")
    one, two = in_ranks(2, compiled, morphtrain.compose(*keys, *more), timeout=300)
    assert one == two
    assert one[-1][-1] == 34


# -- what differs between processes ---------------------------------------------------------------------------------


class Overflows(Method):
    """In the second step a gradient of the last process is beyond float16."""

    def __init__(self) -> None:
        self.steps = 0

    def before_forward(self, run: Run, batch: Batch) -> None:
        self.steps += 1
        weight = next(run.model.parameters())
        last = self.steps == 2 and world.rank() == world.size() - 1
        self.handle = weight.register_hook(lambda gradient: gradient * (math.inf if last else 1))

    def after_backward(self, run: Run) -> None:
        self.handle.remove()


class Waits(Method):
    """The last process is slow."""

    def before_forward(self, run: Run, batch: Batch) -> None:
        time.sleep(0.05 * (world.rank() == world.size() - 1))


class Draws(Method):
    """Notes random numbers: what is drawn with the images of a process, and for the network."""

    def __init__(self) -> None:
        self.own: list[float] = []
        self.common: list[float] = []

    def before_forward(self, run: Run, batch: Batch) -> None:
        self.own.append(torch.rand(len(batch[1])).sum().item())

    def after_backward(self, run: Run) -> None:
        self.common.append(torch.rand(1).item())

    def after_step(self, run: Run) -> None:
        self.common.append(torch.rand(1).item())

    def after_epoch(self, run: Run) -> None:
        self.common.append(torch.rand(1).item())


class Fewer(Method):
    """All processes but the first train on the first image of their share alone; checks the gradient by hand."""

    def before_forward(self, run: Run, batch: Batch) -> Batch:
        images, labels = batch if world.rank() == 0 else (part[:1] for part in batch)
        self.batch = images, labels
        self.twin = copy.deepcopy(run.model)
        return images, labels

    def after_backward(self, run: Run) -> None:
        images, labels = (torch.cat(parts) for parts in zip(*world.gathered(self.batch), strict=True))
        loss = F.cross_entropy(self.twin(images), labels)
        wanted = torch.autograd.grad(loss, list(self.twin.parameters()))
        torch.testing.assert_close(run.loss, loss.detach())
        for parameter, gradient in zip(run.model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


class Branches(nn.Module):
    """A network of which the first process alone uses a part, and another part is used by none."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.body, self.aside = (nn.Conv2d(in_channels, 4, 3, padding=1) for _ in range(2))
        self.unused, self.head = nn.Linear(2, 2), nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if self.training and world.rank() == 0:
            y = y + self.aside(x)
        pooled: torch.Tensor = self.head(y.mean((2, 3)))
        return pooled


class Noted(Method):
    """Notes which parameters have a gradient, which the optimizer will see."""

    def after_backward(self, run: Run) -> None:
        self.present = [name for name, parameter in run.model.named_parameters() if parameter.grad is not None]


class Relative(nn.Module):
    """A loss in units of its own moving average."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("usual", torch.ones(()))

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss, usual = F.cross_entropy(logits, labels), self.usual
        if self.training:
            usual.lerp_(loss.detach(), 0.1)
        return loss / usual.clone()


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


class Unsplit(Precision):
    """A number format of the user's own, which unscales where it adds gradients."""

    def backward(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, more: bool = False) -> None:
        super().backward(loss, optimizer, more)


def epoch_of(config: Config) -> Run:
    run = build_run(config)
    start(run)
    begin_epoch(run)
    list(steps(run))
    finish_epoch(run)
    return run


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as refused:
        start(build_run(config))
    return str(refused.value)


def given_shares(config: Config) -> tuple[list[Any], list[Any]]:
    """The images of this process, and those that it should have of whole batches."""
    run = build_run(config)
    start(run)
    begin_epoch(run)
    shares = list(training_shares(run))
    rows, whole = world.rank(), list(run.all_batches())
    wanted = [(images.tensor_split(2)[rows], labels.tensor_split(2)[rows], len(labels)) for images, labels in whole]
    return [(share.images, share.labels, share.whole) for share in shares], wanted


def behaviour(configs: Mapping[str, Config]) -> dict[str, Any]:
    """What two processes do in each of these cases."""
    drawn = epoch_of(configs["draws"]).methods["methods.0"]
    branches = epoch_of(configs["branches"])
    sparse = epoch_of(configs["sparse"]).history[-1]
    return {
        "overflow": followed(configs["overflow"], 1),
        "plain": followed(configs["plain"], 1),
        "slow": followed(configs["slow"], 1),
        "own": drawn.own,  # type: ignore[attr-defined]
        "common": drawn.common,  # type: ignore[attr-defined]
        "fewer": epoch_of(configs["fewer"]).progress,
        "present": branches.methods["methods.0"].present,  # type: ignore[attr-defined]
        "branches": digest(branches),
        "unused": branches.model.unused.weight.detach(),  # type: ignore[union-attr]
        "first": build_run(configs["branches"]).model.unused.weight.detach(),  # type: ignore[union-attr]
        "sparse": {key: sparse[key] for key in ("gradient_zeros", "gradient_macs_saved")},
        "relative": epoch_of(configs["relative"]).criterion.usual,  # type: ignore[attr-defined]
        "own data": given_shares(configs["own data"]),
        "digits": given_shares(configs["digits"]),
        "cycle": given_shares(configs["cycle"]),
        "unsplit": refusal(configs["unsplit"]),
        "single": refusal(configs["single"]),
        "single of all": refusal(configs["single of all"]),
        "one of each": epoch_of(configs["one of each"]).history[-1]["val_loss"],
    }


TINY = (*SAME, "data.train_samples=31", "epochs=2")
SINGLE = ("model=resnet8", "model.stages=4", "model.width=4")  # ends with one value for each channel of an image
CASES = {
    "plain": (*TINY, *RESNET),
    "slow": (*TINY, *RESNET, "methods=[{_target_: test_ranks_step.Waits}]"),
    "overflow": (
        *(*TINY, *NO_NORM, "data.train_samples=64", "precision=o1", "precision.dtype=float16", "schedule=constant"),
        *("precision.init_scale=256", "methods=[{_target_: test_ranks_step.Overflows}]"),
    ),
    "draws": (*TINY, *NO_NORM, "+model.dropout=0.5", "methods=[{_target_: test_ranks_step.Draws}]"),
    "fewer": (*TINY, *NO_NORM, "batch_policy.max_micro_batch=3", "methods=[{_target_: test_ranks_step.Fewer}]"),
    "branches": (
        *(*TINY, "model=custom", "model._target_=test_ranks_step.Branches", "optimizer.weight_decay=0.1"),
        "methods=[{_target_: test_ranks_step.Noted}]",
    ),
    "sparse": (*TINY, *NO_NORM, "gradient=sparse_activation", "data.train_samples=33"),
    "relative": (*TINY, *NO_NORM, "loss=custom", "loss._target_=test_ranks_step.Relative"),
    "own data": (*SAME[5:], *RESNET, "data=custom", "data._target_=test_ranks_step.whole", "epochs=1"),
    "digits": ("data=digits", "data.shift=2", *SAME[5:], *RESNET, "batch_policy.batch_size=33", "epochs=1"),
    "cycle": (*TINY, *RESNET, "data.order=cycle"),
    "unsplit": (*TINY, *RESNET, "precision=custom", "precision._target_=test_ranks_step.Unsplit"),
    "one of each": (*TINY[:-2], *SINGLE, "data.train_samples=32", "epochs=1", "norm=sync", "batch_policy.batch_size=2"),
    "single of all": (*TINY, *SINGLE, "norm=sync", "batch_policy.batch_size=3"),
    "single": (*TINY, *SINGLE, "batch_policy.batch_size=3"),
}


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return in_ranks(2, behaviour, {name: morphtrain.compose(*keys) for name, keys in CASES.items()})


def test_an_overflow_in_one_process_skips_the_step_in_all(seen: list[dict[str, Any]]) -> None:
    one, two = (each["overflow"] for each in seen)
    assert one == two
    start_, *steps = one[:-1]
    scales = [state["scale"] for *_, state in steps]
    assert scales == [256, 128, 128, 128]
    digests = [start_, *(step[0] for step in steps)]
    assert [a == b for a, b in pairwise(digests)] == [False, True, False, False]
    assert [step[2] for step in steps] == [0.25, 0.25, 0.5, 0.75]


def test_a_slow_process_changes_nothing(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["slow"] == seen[1]["slow"] == seen[0]["plain"] == seen[1]["plain"]


def test_what_is_drawn_for_the_network_is_the_same_in_all_processes(seen: list[dict[str, Any]]) -> None:
    one, two = seen
    assert one["common"] == two["common"] and len(set(one["common"])) == len(one["common"]) == 5
    assert not set(one["own"]) & set(two["own"]), "and what is drawn for images is not"


def test_gradients_are_those_of_all_images_that_methods_have_left(seen: list[dict[str, Any]]) -> None:
    assert [each["fewer"] for each in seen] == pytest.approx([1, 1])


def test_a_gradient_that_some_processes_lack_is_that_of_the_others(seen: list[dict[str, Any]]) -> None:
    names = ["body.weight", "body.bias", "aside.weight", "aside.bias", "head.weight", "head.bias"]
    for each in seen:
        assert each["present"] == names
        assert each["branches"] == seen[0]["branches"]
        assert torch.equal(each["unused"], each["first"]), "what has no gradient in any process is left alone"


def test_shares_of_gradients_are_those_of_all_processes(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["sparse"] == seen[1]["sparse"]
    assert 0 < seen[0]["sparse"]["gradient_zeros"] < 1


def test_the_state_of_a_loss_is_the_same_in_all_processes(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["relative"] == seen[1]["relative"] != 1


@pytest.mark.parametrize("name", ["own data", "digits", "cycle"])
def test_a_process_has_its_slice_of_every_batch_augmented_as_in_one_process(
    name: str, seen: list[dict[str, Any]]
) -> None:
    for each in seen:
        found, wanted = each[name]
        assert len(found) == len(wanted) > 1
        for (images, labels, whole), (x, y, number) in zip(found, wanted, strict=True):
            assert torch.equal(images, x) and torch.equal(labels, y) and whole == number


def test_a_number_format_that_cannot_be_split_is_refused(seen: list[dict[str, Any]]) -> None:
    for each in seen:
        assert each["unsplit"] == (
            "precision=test_ranks_step.Unsplit: has no unscale(optimizer) beside its backward, and 2 processes sum "
            "gradients before these are unscaled (morphtrain.contracts.Precision); one process needs none"
        )


def test_a_single_image_for_a_process_is_refused_where_the_network_cannot_train_on_it(
    seen: list[dict[str, Any]],
) -> None:
    for each in seen:
        for name in ("single", "single of all"):
            assert "batch_policy.batch_size=3: of 31 images among 2 processes, a single one is left" in each[name]
        assert math.isfinite(each["one of each"]), "synchronised norms have two images"


# -- what data make of slices ---------------------------------------------------------------------------------------


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
