"""Smaller images in the first epochs: only training sees them, and trains as if they had been made by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from test_resume import assert_same
from test_settling import epoch, run_of, statistics
from torch import nn
from torch.nn import functional as F

import morphtrain
from morphtrain import schema
from morphtrain.cost import count_macs
from morphtrain.data import ImageData
from morphtrain.data.synthetic import build as synthetic
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.morph import ChannelGraph
from morphtrain.progressive import resized, small_size
from morphtrain.schema.data import Curriculum, Synthetic
from morphtrain.settling import settle, trained_norms
from morphtrain.state import Run
from morphtrain.trainer import begin_epoch, finish_epoch, train, train_epoch
from morphtrain.trainer.checkpoint import ADDED_KEYS, Checkpoint

TINY = (
    *("data=synthetic", "data.train_samples=96", "data.val_samples=32", "data.image_size=16", "data.num_classes=4"),
    *("model.width=4", "batch_policy.batch_size=16", "epochs=4", "tracking=none", "device=cpu"),
)


class Sizes:
    """Records the sizes of images that go through a network; what is taken is forgotten."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: set[tuple[int, ...]] = set()
        model.register_forward_pre_hook(lambda module, args: self.seen.add(tuple(args[0].shape[2:])))

    def take(self) -> set[tuple[int, ...]]:
        seen, self.seen = self.seen, set()
        return seen


def sizes_of(run: Run) -> Iterator[tuple[set[tuple[int, ...]], set[tuple[int, ...]], dict[str, float]]]:
    """Of every epoch: the sizes in training, those in all that follows, and the record."""
    sizes = Sizes(run.model)
    while run.epoch < run.config.epochs:
        begin_epoch(run)
        sizes.take()  # what the test itself has done with the network
        train_epoch(run)
        trained = sizes.take()
        record = finish_epoch(run)
        yield trained, sizes.take(), record


def test_training_sees_small_images_first_and_everything_else_full_ones() -> None:
    run = run_of(*TINY, "data.progressive=0.7")
    for trained, after, record in sizes_of(run):
        side = 12 if run.epoch <= 3 else 16
        assert (trained, after, record["image_size"]) == ({(side, side)}, {(16, 16)}, side)
        assert record["macs"] == count_macs(run.model, (3, 16, 16)) == run.initial["macs"]
    assert run.config.recorded[-1] == "image_size"


def test_without_it_nothing_is_resized_or_recorded() -> None:
    run = run_of(*TINY, "data.progressive_until=0.5")
    for trained, after, record in sizes_of(run):
        assert trained == after == {(16, 16)}
        assert "image_size" not in record


class Shrinks(Method):
    """What `data.progressive=0.5` means, made by hand."""

    def before_forward(self, run: Run, batch: Any) -> Any:
        images, labels = batch
        small = F.interpolate(images, size=(8, 8), mode="bilinear", antialias=True)
        return (small if run.epoch <= 2 else images), labels


@pytest.mark.parametrize("options", [(), ("batch_policy.max_micro_batch=6", "norm=ghost", "norm.ghost_batch_size=3")])
def test_the_weights_are_those_of_images_resized_by_hand(options: tuple[str, ...]) -> None:
    ours = run_of(*TINY, *options, "data.progressive=0.5", "data.progressive_until=0.5")
    theirs = run_of(*TINY, *options, "methods=[{_target_: test_progressive.Shrinks}]")
    for _ in range(3):
        assert epoch(ours)["val_loss"] == epoch(theirs)["val_loss"]
    assert_same(ours.model.state_dict(), theirs.model.state_dict())


def test_settled_statistics_are_those_of_full_images() -> None:
    run = run_of(*TINY, "data.progressive=0.5")
    epoch(run)
    assert run.small_size(run.epoch) == (8, 8)
    batches = [images for images, _ in run.data.train_batches(run.batch_size, run.generator(run.epoch))]
    for images, same in ((batches, True), ([resized(batch, (8, 8)) for batch in batches], False)):
        model = copy.deepcopy(run.model).train()
        settle(model, trained_norms(model), images)
        found = statistics(model)
        assert all(torch.allclose(value, found[name]) for name, value in statistics(run.model).items()) == same


def test_what_is_pruned_and_grown_meanwhile_is_traced_at_full_size() -> None:
    """The graph, its MACs and the memory that a batch is planned for do not shrink with the images."""
    grown = ("grow=wider", "grow.at_epochs=[2]", "grow.factor=1.5", "epochs=4")
    run = run_of(*SMALL, *grown, "data.image_size=16", "data.progressive=0.5", "tracking=none")
    for trained, after, record in sizes_of(run):
        assert trained == ({(8, 8)} if run.epoch <= 3 else {(16, 16)})
        assert after == {(16, 16)}
        assert record["macs"] == count_macs(run.model, (3, 16, 16))
    assert {2} <= {change["epoch"] for change in run.changes}, "changed while images are small"
    fresh = ChannelGraph.trace(run.model, torch.zeros(1, 3, 16, 16))
    assert [(s.name, s.size) for s in run.graph.spaces] == [(s.name, s.size) for s in fresh.spaces]


@pytest.mark.parametrize(("grown_at", "side"), [(2, 8), (3, 16)])
@pytest.mark.parametrize("grow", ["grow.operator=layer", "grow.start=half_half"])
def test_what_is_inserted_changes_nothing_for_the_images_that_it_is_trained_on(
    grow: str, grown_at: int, side: int
) -> None:
    """The statistics of a new norm are those of the next epoch's size; on one and the same batch nothing changes."""
    deeper = ("grow=deeper", f"grow.at_epochs=[{grown_at}]", "grow.calibration_batches=1", grow)
    run = run_of(*TINY, "data.progressive=0.5", *deeper)
    for _ in range(grown_at - 1):
        epoch(run)
    begin_epoch(run)
    train_epoch(run)
    images, _ = next(run.data.train_batches(run.batch_size, run.generator(run.epoch)))
    outputs = {}
    for size in (8, 16):
        seen = resized(images, (size, size)) if size < 16 else images
        outputs[size] = seen, copy.deepcopy(run.model).train()(seen)
    run.methods["grow"].after_epoch(run)
    assert run.change.startswith("inserted")
    off = {size: (run.model(seen) - before).abs().max().item() for size, (seen, before) in outputs.items()}
    assert off.pop(side) < 1e-4
    assert min(off.values()) > 1e-3, "for images of the other size it does"


def test_a_memory_budget_is_planned_for_full_images() -> None:
    plan = ("batch_policy=fill_memory", "batch_policy.budget=3MB", "batch_policy.overhead=0", "data.image_size=32")
    full, small = (run_of(*TINY, *plan, f"data.progressive={scale}") for scale in (1, 0.5))
    assert full.micro_batch == small.micro_batch
    assert 1 < (full.micro_batch or 0) < 16


@pytest.mark.parametrize("scale", [0.3, 0.7])
def test_images_are_resized_as_pil_does(scale: float) -> None:
    """Bilinear and antialiased: PIL's is another implementation of it."""
    images, size = torch.randn(2, 3, 28, 36), small_size(Curriculum(progressive=scale), (3, 28, 36))
    assert size == {0.3: (8, 12), 0.7: (20, 24)}[scale]
    found = resized(images, size)
    for image, small in zip(images.flatten(0, 1), found.flatten(0, 1), strict=True):
        wanted = Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
        torch.testing.assert_close(small, torch.from_numpy(np.array(wanted)), atol=1e-5, rtol=0)
    torch.testing.assert_close(resized(torch.full((1, 1, 28, 36), 3.0), size), torch.full((1, 1, *size), 3.0))


def test_resized_images_keep_their_memory_format() -> None:
    images = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    assert resized(images, (12, 12)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("side", "scale", "small"), [(16, 0.7, 12), (28, 0.7, 20), (224, 0.5, 112), (32, 0.7, 24), (8, 0.1, 4), (3, 0.5, 3)]
)
def test_a_small_side_is_a_multiple_of_four(side: int, scale: float, small: int) -> None:
    assert small_size(Curriculum(progressive=scale), (1, side, side)) == (small, small)


@pytest.mark.parametrize(("until", "epochs", "small"), [(0.75, 4, 3), (0.75, 60, 45), (0.29, 100, 29), (0.5, 5, 2)])
def test_epochs_that_end_in_the_first_part_are_small(until: float, epochs: int, small: int) -> None:
    assert Curriculum(progressive=0.5, progressive_until=until).small_epochs(epochs) == small


class Flat(nn.Module):
    """A network for one size of images: its linear layer sees them as they are."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 16 * 16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu().flatten(1))


REFUSED = {
    "flat": (
        ["model=custom", "model._target_=test_progressive.Flat", "data.progressive=0.7"],
        r"data.progressive=0.7: images of 16x16 are 12x12 at first, but model=test_progressive.Flat: cannot take "
        r"images of \(3, 12, 12\) .*; a network that ends in global pooling",
    ),
    "as large": (
        ["data.progressive=0.9"],
        "data.progressive=0.9: images of 16x16 would stay as they are, in steps of 4",
    ),
    "single image": (
        ["data.train_samples=97", "data.image_size=8", "data.progressive=0.5"],
        r"a single one is left for a pass, but the model: cannot take images of \(3, 4, 4\) in training mode",
    ),
    "no epoch": (["epochs=1", "data.progressive=0.5"], "data.progressive_until=0.75: no epoch has smaller images with"),
    "zero": (["data.progressive=0"], "data.progressive=0.0: must be above 0 and at most 1"),
    "larger": (["data.progressive=1.5"], "data.progressive=1.5: must be above 0 and at most 1"),
    "all epochs": (
        ["data.progressive_until=1"],
        "data.progressive_until=1.0: must be above 0 and below 1, as a share of the epochs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_when_the_run_is_built(case: str) -> None:
    overrides, message = REFUSED[case]
    models = ["model.width=4"] if "model=custom" in overrides else []
    with pytest.raises(UserError, match=message) as refused:
        run_of(*(o for o in TINY if o not in models), *overrides)
    assert "\n" not in str(refused.value)


def test_a_single_image_at_full_size_is_no_reason() -> None:
    """The network of "single image" above takes it: only small images leave batch norm a single value."""
    run = run_of(*TINY, "data.train_samples=97", "data.image_size=8")
    assert run.leaves_single(97)


def own(samples: int) -> ImageData:
    """A data set of one's own, which knows nothing of `data.progressive`."""
    data = synthetic(Synthetic("synthetic", samples, 20, 16, 3, 4, 1.0))
    return ImageData(data.train, data.val, 4)


OWN = ("data=custom", "data._target_=test_progressive.own", "+data.samples=64", "model.width=4", *TINY[-4:])


def test_own_data_are_made_smaller_too() -> None:
    run = run_of(*OWN, "data.progressive=0.5")
    assert run.config.data.arguments == {"samples": 64}
    assert [trained for trained, _, _ in sizes_of(run)] == [*[{(8, 8)}] * 3, {(16, 16)}]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.progressive=much", "data.progressive=much: must be a number"),
        ("data.progressive=2", "data.progressive=2.0: must be above 0 and at most 1"),
        ("data.infobatch=null", "data.infobatch=null: must be a number"),
    ],
)
def test_a_wrong_value_for_own_data_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        morphtrain.compose(*OWN, override)


def test_an_option_file_of_ones_own_may_leave_the_keys_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("_target_: test_progressive.own\nsamples: 64\n")
    plain = morphtrain.compose("data=mine", config_dir=tmp_path).data
    assert (plain.progressive, plain.infobatch, plain.arguments) == (1, 0, {"samples": 64})
    assert morphtrain.compose("data=mine", "+data.progressive=0.5", config_dir=tmp_path).data.progressive == 0.5


def test_a_checkpoint_from_before_there_was_this_goes_on(tmp_path: Path) -> None:
    assert {key: value for key, value in ADDED_KEYS.items() if key.removeprefix("data.") in vars(Curriculum())} == {
        f"data.{key}": value for key, value in vars(Curriculum()).items()
    }
    config = morphtrain.compose(*TINY)
    train(config, tmp_path, {})
    stored = Checkpoint(tmp_path / "last.pt")
    for key in asdict(Curriculum()):
        del stored.facts["config"]["data"][key]
    assert stored.restore(config).epoch == 4
    with pytest.raises(UserError, match=r"data\.progressive=0\.5: .* was written with data\.progressive=1"):
        stored.restore(morphtrain.compose(*TINY, "data.progressive=0.5"))


def test_every_data_option_has_the_keys() -> None:
    keys = set(asdict(Curriculum()))
    assert keys == {"progressive", "progressive_until", "infobatch", "infobatch_until", "order", "mixup", "cutmix"}
    for kind in schema.OPTIONS["data"].values():
        assert issubclass(kind, Curriculum)
    for path in (schema.CONF / "data").glob("*.yaml"):
        assert all(f"\n{key}: {value}" in path.read_text() for key, value in vars(Curriculum()).items()), path
