"""What several processes have in a training step is the same in all to the bit, whatever differs between them."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from ranks import in_ranks
from test_ranks_step import NO_NORM, RESNET, SAME, steps
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import morphtrain
from morphtrain import compilation, world
from morphtrain.contracts import Batch
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.precision import Precision
from morphtrain.schema import Config
from morphtrain.state import Run
from morphtrain.trainer import auto, begin_epoch, build_run, finish_epoch, start
from morphtrain.trainer.share import training_shares

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
    "slow": (*TINY, *RESNET, "methods=[{_target_: test_ranks_same.Waits}]"),
    "overflow": (
        *(*TINY, *NO_NORM, "data.train_samples=64", "precision=o1", "precision.dtype=float16", "schedule=constant"),
        *("precision.init_scale=256", "methods=[{_target_: test_ranks_same.Overflows}]"),
    ),
    "draws": (*TINY, *NO_NORM, "+model.dropout=0.5", "methods=[{_target_: test_ranks_same.Draws}]"),
    "fewer": (*TINY, *NO_NORM, "batch_policy.max_micro_batch=3", "methods=[{_target_: test_ranks_same.Fewer}]"),
    "branches": (
        *(*TINY, "model=custom", "model._target_=test_ranks_same.Branches", "optimizer.weight_decay=0.1"),
        "methods=[{_target_: test_ranks_same.Noted}]",
    ),
    "sparse": (*TINY, *NO_NORM, "gradient=sparse_activation", "data.train_samples=33"),
    "relative": (*TINY, *NO_NORM, "loss=custom", "loss._target_=test_ranks_same.Relative"),
    "own data": (*SAME[5:], *RESNET, "data=custom", "data._target_=test_ranks_step.whole", "epochs=1"),
    "digits": ("data=digits", "data.shift=2", *SAME[5:], *RESNET, "batch_policy.batch_size=33", "epochs=1"),
    "cycle": (*TINY, *RESNET, "data.order=cycle"),
    "unsplit": (*TINY, *RESNET, "precision=custom", "precision._target_=test_ranks_same.Unsplit"),
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
            "precision=test_ranks_same.Unsplit: has no unscale(optimizer) beside its backward, and 2 processes sum "
            "gradients before these are unscaled (morphtrain.contracts.Precision); one process needs none"
        )


def test_a_single_image_for_a_process_is_refused_where_the_network_cannot_train_on_it(
    seen: list[dict[str, Any]],
) -> None:
    for each in seen:
        for name in ("single", "single of all"):
            assert "batch_policy.batch_size=3: of 31 images among 2 processes, a single one is left" in each[name]
        assert math.isfinite(each["one of each"]), "synchronised norms have two images"
