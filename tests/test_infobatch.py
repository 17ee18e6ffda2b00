"""InfoBatch: what it leaves out is by chance, what it keeps makes up for it, and the rest is as with all images."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_image_folder import config as folder_config
from test_image_folder import noise, write
from test_resume import assert_same
from test_settling import epoch, run_of
from torch import nn
from torch.nn import functional as F

import morphtrain
from morphtrain.compare.training import steps
from morphtrain.contracts import Batch, Loss, SelectableData
from morphtrain.data import ImageData, Images, image_folder
from morphtrain.errors import UserError
from morphtrain.infobatch import InfoBatch, build, unreduced
from morphtrain.method import Method
from morphtrain.prune import morphnet, prunetrain
from morphtrain.schema.data import Curriculum
from morphtrain.state import Run
from morphtrain.trainer import begin_epoch, build_run, checkpoint, start, train_epoch
from morphtrain.trainer.loop import backward
from morphtrain.trainer.share import training_shares

CPU = torch.device("cpu")
SIGMAS = 4.5  # standard errors that a mean of random numbers may be off
LOSSES = torch.tensor([9.0, 8, 7, 6, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # of ten images, of which six are below the mean
PLAIN = (
    *("data=synthetic", "data.train_samples=200", "data.val_samples=40", "data.image_size=8", "data.num_classes=4"),
    *("model.width=4", "batch_policy.batch_size=16", "epochs=6", "tracking=none", "device=cpu"),
)
THINNED = (*PLAIN, "data.infobatch=0.5", "data.infobatch_until=0.7")  # in the epochs 2 to 4
WATCHED = (*THINNED, "methods=[{_target_: test_infobatch.Watch}]")


def numbered(samples: int, shift: int = 0) -> ImageData:
    """Images that say which ones they are."""
    pixels = torch.arange(float(samples)).view(-1, 1, 1, 1).expand(-1, 1, 5, 5).contiguous()
    images = Images(pixels, torch.arange(samples) % 3)
    return ImageData(images, images, 3, shift)


def scored(losses: torch.Tensor, drop: float = 0.5) -> InfoBatch:
    """InfoBatch after an epoch that ended with these losses."""
    loss = unreduced(F.cross_entropy)
    assert loss is not None
    infobatch = InfoBatch(len(losses), loss, drop, last_epoch=10, device=CPU)
    infobatch.scores.copy_(losses)
    return infobatch


def never(images: int) -> bool:
    return False


def chosen(infobatch: InfoBatch, seed: int, leaves_single: Callable[[int], bool] = never) -> torch.Tensor:
    """The rows of an epoch, in its order."""
    infobatch.choose(2, torch.Generator().manual_seed(seed), leaves_single)
    return infobatch.rows


def test_all_choices_are_alike_likely_and_the_mean_of_their_gradients_is_that_of_all_images() -> None:
    """All 20 ways to keep three of six come up, and over them the mean is exact."""
    weight, x, y = torch.randn(3, 4, requires_grad=True), torch.randn(10, 4), torch.arange(10) % 3
    infobatch, counts, sums = scored(LOSSES), Counter[frozenset[int]](), {}
    for seed in range(2000):
        rows = chosen(infobatch, seed)
        kept = frozenset(rows.tolist())
        counts[kept] += 1
        if kept not in sums:
            loss = infobatch.loss(x[rows] @ weight.T, y[rows], rows) * len(rows)
            infobatch.scores.copy_(LOSSES)
            sums[kept] = torch.autograd.grad(loss, weight)[0]
    assert len(counts) == math.comb(6, 3) == 20
    assert all({0, 1, 2, 3} < kept and len(kept) == 7 for kept in counts)
    assert all(abs(count - 100) < SIGMAS * math.sqrt(2000 * 0.05 * 0.95) for count in counts.values())
    whole = torch.autograd.grad(F.cross_entropy(x @ weight.T, y, reduction="sum"), weight)[0]
    torch.testing.assert_close(torch.stack(list(sums.values())).mean(0), whole)


def test_where_an_image_comes_in_an_epoch_does_not_depend_on_its_score() -> None:
    places = []
    for seed in range(1000):
        rows = chosen(scored(LOSSES), seed)
        places.append(sum((rows == row).nonzero().item() for row in range(4)) / 4)  # of those with high scores
    off = torch.tensor(places).double() - 3  # the mean of 0 to 6
    assert abs(off.mean()) < SIGMAS * off.std() / math.sqrt(len(off))


def test_the_weights_sum_up_to_all_images() -> None:
    infobatch = scored(torch.cat([LOSSES, torch.tensor([0.7])]), drop=0.3)  # seven below the mean, of which five stay
    rows = chosen(infobatch, 0)
    assert sorted(infobatch.weights[rows].tolist()) == pytest.approx([1, 1, 1, 1, *[7 / 5] * 5])
    assert infobatch.weights[rows].sum() == pytest.approx(11)


def test_the_seed_decides() -> None:
    assert torch.equal(chosen(scored(LOSSES), 3), chosen(scored(LOSSES), 3))
    assert not torch.equal(chosen(scored(LOSSES), 3), chosen(scored(LOSSES), 4))


@pytest.mark.parametrize("scores", [torch.full((10,), math.inf), torch.ones(10)], ids=["first epoch", "all alike"])
def test_without_an_image_below_the_mean_all_are_kept(scores: torch.Tensor) -> None:
    infobatch = scored(scores)
    assert sorted(chosen(infobatch, 0).tolist()) == list(range(10))
    assert torch.equal(infobatch.weights, torch.ones(10))


def test_images_that_were_never_trained_on_are_kept_and_no_reason_to_leave_out_others() -> None:
    infobatch = scored(torch.cat([LOSSES, torch.tensor([math.inf])]))
    for seed in range(20):
        assert {0, 1, 2, 3, 10} < set(chosen(infobatch, seed).tolist())


def test_after_the_last_epoch_that_leaves_any_out_all_are_kept_and_count_alike() -> None:
    infobatch = scored(LOSSES)
    assert len(chosen(infobatch, 0)) == 7
    infobatch.choose(11, torch.Generator().manual_seed(0), never)
    assert len(infobatch.rows) == 10
    assert torch.equal(infobatch.weights, torch.ones(10))


def test_no_epoch_ends_in_a_pass_with_a_single_image() -> None:
    run, singles = run_of(*PLAIN), 0
    for low, (batch_size, micro_batch) in itertools.product(range(1, 60), [(7, None), (12, 4), (5, 3), (9, 2)]):
        run.batch_size, run.micro_batch = batch_size, micro_batch
        infobatch = scored(torch.cat([torch.full((60 - low,), 9.0), torch.zeros(low)]))
        least = 60 - low + max(1, round(low / 2))
        kept = len(chosen(infobatch, low, run.leaves_single))
        assert infobatch.weights[infobatch.rows].sum() == pytest.approx(60)
        if run.leaves_single(60):  # a pass of one cannot be avoided
            assert kept == least
        else:
            singles += run.leaves_single(least)
            assert not run.leaves_single(kept)
            assert least <= kept <= least + 1
    assert singles > 10


DATA: dict[str, Callable[[Path], SelectableData]] = {
    "tensors": lambda root: numbered(8, shift=1),
    "bytes": lambda root: image_folder.build(folder_config(write(root, noise([(24, 24)] * 8)), in_memory=True)),
    "files": lambda root: image_folder.build(folder_config(write(root, noise([(24, 24)] * 8)), in_memory=False)),
}


def gathered(batches: Iterator[Batch]) -> Batch:
    """All images and labels of batches of three."""
    images, labels = zip(*batches, strict=True)
    assert [len(batch) for batch in labels[:-1]] == [3] * (len(labels) - 1)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("kind", DATA)
def test_chosen_images_come_in_their_order_and_are_augmented_as_all_are(kind: str, tmp_path: Path) -> None:
    data, generators = DATA[kind](tmp_path), [torch.Generator().manual_seed(5) for _ in range(2)]
    order = torch.randperm(8, generator=generators[1])
    of_all, of_rows = data.train_batches(3, generators[0]), data.train_batches_of(order, 3, generators[1])
    assert all(map(torch.equal, gathered(of_all), gathered(of_rows)))
    rows, seeded = torch.tensor([6, 1, 3, 2, 7]), torch.Generator().manual_seed
    labels = gathered(data.train_batches_of(torch.arange(8), 3, seeded(1)))[1]
    assert torch.equal(gathered(data.train_batches_of(rows, 3, seeded(1)))[1], labels[rows])


class Watch(Method):
    """Notes the images that go into the network, and the losses of the steps, times their images."""

    def __init__(self) -> None:
        self.images: list[torch.Tensor] = []
        self.losses: list[float] = []

    def before_forward(self, run: Run, batch: Any) -> None:
        self.images.append(batch[0])

    def after_backward(self, run: Run) -> None:
        self.losses.append(run.loss.item() * len(self.images[-1]))


def watched() -> tuple[Run, InfoBatch, Watch]:
    run = run_of(*WATCHED)
    watch = run.methods["methods.0"]
    assert isinstance(watch, Watch)
    assert run.infobatch is not None
    return run, run.infobatch, watch


def test_a_run_leaves_out_half_of_what_is_below_the_mean_from_the_second_epoch_on_and_nothing_in_the_last() -> None:
    run, infobatch, watch = watched()
    for number in range(1, 7):
        scores, watch.images, watch.losses = infobatch.scores.clone(), [], []
        record = epoch(run)
        seen, rows = torch.cat(watch.images), infobatch.rows
        low = int((scores < scores.mean()).sum())
        least = 200 - low + max(1, round(low / 2)) if 2 <= number <= 4 else 200
        assert least <= len(rows) <= least + 1
        assert set((scores >= scores.mean()).nonzero().flatten().tolist()) <= set(rows.tolist())
        assert len(seen) == len(rows) == len(set(rows.tolist()))
        assert torch.equal(seen, run.data.train.pixels[rows]), "a score is that of the image that was trained on"
        assert set((infobatch.scores != scores).nonzero().flatten().tolist()) <= set(rows.tolist())
        assert run.progress == pytest.approx(number), "the schedule runs over the epochs, whatever they leave out"
        assert record["share_trained"] == len(rows) / 200
        assert record["samples_per_second"] == pytest.approx(len(rows) / record["epoch_seconds"])
        weighted = (infobatch.weights * infobatch.scores)[rows].sum().item() / 200
        assert record["train_loss"] == pytest.approx(weighted, rel=1e-5)
        assert sum(watch.losses) / len(rows) == pytest.approx(weighted, rel=1e-5), "run.loss is on the same scale"
        assert 0 <= record["train_accuracy"] <= 1
    assert run.history[1]["share_trained"] < 0.9
    assert run.config.recorded[-1] == "share_trained"


def test_the_first_epoch_is_that_of_a_run_with_all_images() -> None:
    thinned, plain = (epoch(run_of(*options, "optimizer.lr=0.01")) for options in (THINNED, PLAIN))
    assert thinned.keys() - plain.keys() == {"share_trained"}
    for key in ("train_loss", "val_loss", "learning_rate"):
        assert thinned[key] == pytest.approx(plain[key], rel=1e-3), key
    assert thinned["train_accuracy"] == pytest.approx(plain["train_accuracy"], abs=0.011)


class Smooth(nn.Module):
    """A network without batch norm, whose gradients are sums over images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu().mean((2, 3)))


def test_the_gradient_is_that_of_the_weighted_losses_in_any_number_of_passes() -> None:
    own = [override for override in THINNED if not override.startswith("model")]
    run = run_of(*own, "model=custom", "model._target_=test_infobatch.Smooth")
    epoch(run)
    begin_epoch(run)
    share, found = next(training_shares(run)), []
    images, labels, rows = share.images, share.labels, share.rows
    assert run.infobatch is not None and torch.equal(rows, run.infobatch.rows[: len(labels)])
    for most in (None, 5):
        run.micro_batch = most
        run.optimizer.zero_grad()
        loss, right = backward(run, share)
        found.append([loss, right, *(parameter.grad.clone() for parameter in run.model.parameters())])
    torch.testing.assert_close(*found)
    run.optimizer.zero_grad()
    losses = F.cross_entropy(run.model(images), labels, reduction="none") * run.infobatch.weights[rows]
    losses.mean().backward()
    torch.testing.assert_close([parameter.grad for parameter in run.model.parameters()], found[0][2:])
    assert found[0][0].item() == pytest.approx(losses.mean().item() / run.step_weight)
    assert run.step_weight == len(run.data.train) / len(run.infobatch.rows) > 1.05


class Looks(Method):
    """Notes how many images an epoch is said to train on, and for how many each stands: before it, and in its steps."""

    def __init__(self) -> None:
        self.before: dict[int, tuple[int, float]] = {}
        self.trained: dict[int, tuple[int, float]] = {}

    def before_epoch(self, run: Run) -> None:
        self.before[run.epoch] = run.epoch_images, run.step_weight

    def after_step(self, run: Run) -> None:
        self.trained[run.epoch] = run.epoch_images, run.step_weight


def test_a_resumed_run_is_told_the_same_of_the_epoch_to_come(tmp_path: Path) -> None:
    """Nothing is chosen for it yet; what was chosen for the last one is over."""
    config = morphtrain.compose(*THINNED, "methods=[{_target_: test_infobatch.Looks}]")
    whole = build_run(config)
    start(whole)
    for _ in range(2):
        epoch(whole)
    checkpoint.save(whole, tmp_path, None)
    resumed = checkpoint.Checkpoint(tmp_path / checkpoint.LAST).restore(config)
    start(resumed)
    for run in (whole, resumed):
        epoch(run)
    kept, again = (run.methods["methods.0"] for run in (whole, resumed))
    assert isinstance(kept, Looks)
    assert isinstance(again, Looks)
    assert kept.trained[2][0] < 200, "the test is about epochs that leave some out"
    assert kept.before[3] == again.before[3] == (200, 1.0)
    assert kept.trained[3] == again.trained[3] == (whole.epoch_images, 200 / whole.epoch_images)


def test_the_steps_of_a_comparison_are_whole_batches() -> None:
    run, _, watch = watched()
    taken = sum(1 for _ in steps(run))
    assert [len(images) for images in watch.images] == [16] * taken
    assert 6 * (100 // 16) < taken < 6 * (200 // 16)


_price = morphnet.MorphNetPenalty._price


def priced_once(method: morphnet.MorphNetPenalty, run: Run) -> None:
    """What channels cost changes with the number of those alive, which is not what is tested."""
    if not method.priced:
        _price(method, run)
    method.priced = run.epoch


# Where each penalty pulls, and its options.
PENALTIES: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "proximal": (prunetrain, "shrink", ("prune=prunetrain",)),
    "subgradient": (prunetrain, "add_gradient", ("prune=prunetrain", "prune.update=subgradient")),
    "morphnet": (morphnet.ChannelNorms, "shrink", ("prune=morphnet",)),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_penalty_pulls_as_hard_in_an_epoch_as_if_it_had_all_images(
    penalty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would lose against gradients that make up for what is left out, and take less than was planned."""
    owner, name, options = PENALTIES[penalty]
    pulls: list[float] = []
    monkeypatch.setattr(owner, name, lambda whom, amount, *_: pulls.append(float(torch.as_tensor(amount).max())))
    monkeypatch.setattr(morphnet.MorphNetPenalty, "_price", priced_once)
    run = run_of(*THINNED, *options, "prune.lasso_ratio=0.2", "schedule=constant", "prune.interval=6")
    totals = []
    while run.epoch < 3:
        pulls.clear()
        epoch(run)
        totals.append(sum(pulls))
    assert run.history[1]["share_trained"] < 0.9
    assert totals[1:] == pytest.approx(totals[:1] * 2, rel=0.07), "a last step counts as much as a whole one"


class Doubles(Method):
    def before_forward(self, run: Run, batch: Any) -> Any:
        images, labels = batch
        return images.repeat(2, 1, 1, 1), labels.repeat(2)


def test_a_method_that_makes_more_images_is_named() -> None:
    run = run_of(*THINNED, "methods=[{_target_: test_infobatch.Doubles}]")
    begin_epoch(run)
    with pytest.raises(UserError, match=r"data\.infobatch=0\.5: a method makes 32 images of the 16 of a batch"):
        train_epoch(run)


class OwnMean(nn.Module):
    """A loss that gives the mean alone."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels)


class OwnReduction(nn.Module):
    """A loss that takes torch's keyword."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        return 2 * F.cross_entropy(logits, labels, reduction=reduction)


def built(loss: Loss) -> InfoBatch | None:
    return build(Curriculum(infobatch=0.5), 8, numbered(9), loss, CPU, data_name="numbers", loss_name="own")


@pytest.mark.parametrize(
    "loss", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.2), OwnReduction(), nn.MultiMarginLoss()]
)
def test_a_loss_with_torchs_reduction_says_the_loss_of_each_image(loss: Loss) -> None:
    infobatch = built(loss)
    assert infobatch is not None
    logits, labels = torch.randn(6, 3), torch.arange(6) % 3
    alone = torch.stack([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(infobatch.losses(logits, labels), alone)
    torch.testing.assert_close(loss(logits, labels), alone.mean())  # is as it was


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3])), OwnMean()])
def test_a_loss_that_is_no_mean_over_images_or_says_nothing_else_is_refused(loss: Loss) -> None:
    with pytest.raises(UserError, match=r"data\.infobatch=0\.5: loss=own cannot say the losses of single images"):
        built(loss)


class Staying(ImageData):
    """Data of its own class wherever it is."""

    def to(self, *_: Any) -> Staying:
        return self


class Negative(Staying):
    """Augments in a way that chosen images would not go through."""

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        for images, labels in super().train_batches(batch_size, generator):
            yield -images, labels


class Sorted(Staying):
    """Gives chosen images in another order."""

    def train_batches_of(self, rows: torch.Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        return super().train_batches_of(rows.sort().values, batch_size, generator)


class Bare:
    """What `Data` asks for, and no more."""

    advice, num_classes, input_shape = "", 3, (1, 5, 5)

    def __init__(self) -> None:
        of = numbered(30)
        self.train, self.val = of.train, of.val
        self.train_batches, self.val_batches = of.train_batches, of.val_batches

    def to(self, *_: Any) -> Bare:
        return self


def own(kind: str) -> Any:
    data = numbered(30)
    kinds = {"staying": Staying, "negative": Negative, "sorted": Sorted}
    return kinds[kind](data.train, data.val, 3) if kind in kinds else Bare()


OWN = (*PLAIN[5:], "data=custom", "data._target_=test_infobatch.own", "data.infobatch=0.5")


def test_own_data_that_can_be_asked_for_images_are_thinned() -> None:
    run = run_of(*OWN, "+data.kind=staying", "optimizer.lr=0.001")
    while run.epoch < 2:
        epoch(run)
    assert run.history[1]["share_trained"] < 1
    assert run.config.data.arguments == {"kind": "staying"}


NO_CHOICE = (
    "data.infobatch=0.5: data=test_infobatch.own has no train_batches_of(rows, batch_size, generator) beside its "
    "train_batches, to give batches of chosen images (morphtrain.contracts.SelectableData); data.infobatch=0 trains on "
    "all images"
)
REFUSED = {
    "loss": (
        (*THINNED, "loss=custom", "loss._target_=test_infobatch.OwnMean"),
        "data.infobatch=0.5: loss=test_infobatch.OwnMean cannot say the losses of single images, whose mean it is; one "
        "with torch's `reduction` can, and data.infobatch=0 trains on all images",
    ),
    "share": ((*PLAIN, "data.infobatch=1"), "data.infobatch=1.0: must be 0 or more and below 1"),
    "until": (
        (*PLAIN, "data.infobatch_until=0"),
        "data.infobatch_until=0.0: must be above 0 and below 1, as a share of the epochs",
    ),
    "epochs": (
        (*THINNED, "epochs=2"),
        "data.infobatch_until=0.7: the first epoch sees all images, and none of the others may leave any out with "
        "epochs=2; more epochs work, or data.infobatch=0",
    ),
    "bare": ((*OWN, "+data.kind=bare"), NO_CHOICE),
    "own batches": ((*OWN, "+data.kind=negative"), NO_CHOICE),
    "sorted": (
        (*OWN, "+data.kind=sorted"),
        "data=test_infobatch.own: train_batches_of gives images in an order of its own; that of the rows it is asked "
        "for is needed",
    ),
    "metric": ((*PLAIN, "objective=[share_trained]"), "objective=share_trained: no such metric; "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_thinned_is_refused_when_the_run_is_built(case: str) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(UserError) as refused:
        run_of(*overrides)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_scores_of_another_training_set_are_refused() -> None:
    with pytest.raises(ValueError, match="scores of 5 images; the training set has 9"):
        scored(torch.ones(9)).load_state_dict({"scores": torch.ones(5)})


def test_statistics_are_settled_on_all_images() -> None:
    """Those that are kept are harder than the average."""
    run = run_of(*THINNED)
    epoch(run)
    epoch(run)
    thinned = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.infobatch = None
    run.settle()
    assert_same(dict(run.model.state_dict()), thinned)
