"""Mixup, CutMix and smoothed labels: images and labels are mixed alike, and the rest of a run is as ever."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_settling import epoch, run_of
from torch import nn
from torch.nn import functional as F

import morphtrain
from morphtrain.errors import UserError
from morphtrain.infobatch import unreduced
from morphtrain.loss import cross_entropy
from morphtrain.mixing import Mixing
from morphtrain.schema.loss import CrossEntropy
from morphtrain.state import Run
from morphtrain.trainer import build_run, train
from morphtrain.trainer.checkpoint import Checkpoint

SIGMAS = 4.5  # standard errors that a mean of random numbers may be off
PLAIN = (
    *("data=synthetic", "data.train_samples=50", "data.val_samples=20", "data.image_size=8", "data.num_classes=4"),
    *("model.width=4", "batch_policy.batch_size=16", "epochs=3", "tracking=none", "device=cpu"),
)
NOTED = (*PLAIN, "loss=custom", "loss._target_=test_mixing.Noting")


def mixed(mixing: Mixing, images: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return mixing(images, labels, [len(labels)], seed)


def test_mixup_adds_each_image_and_the_one_before_it_in_the_shares_of_their_classes() -> None:
    images, labels = torch.rand(5, 3, 6, 4), torch.arange(5)
    found, shares = mixed(Mixing(0.4, 0, 5), images, labels, seed=3)
    share = shares.diagonal()
    assert torch.equal(share, share[:1].expand(5)) and 0 < share[0] < 1
    other = torch.eye(5).roll(1, 0)
    torch.testing.assert_close(shares, share[0] * torch.eye(5) + (1 - share[0]) * other)
    torch.testing.assert_close(found, share[0] * images + (1 - share[0]) * images.roll(1, 0))


def test_cutmix_pastes_a_box_of_the_image_before_in_the_shares_of_their_classes() -> None:
    """Images of one value each: the value says which image a pixel is of."""
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 2, 8, 6).contiguous()
    pasted = 0
    for seed in range(30):
        found, shares = mixed(Mixing(0, 1, 5), images, torch.arange(5), seed)
        for number, (image, share) in enumerate(zip(found, shares, strict=True)):
            of_other = image == (number - 1) % 5
            assert (of_other | (image == number)).all() and torch.equal(of_other[0], of_other[1])
            rows, columns = of_other[0].any(1), of_other[0].any(0)
            assert of_other[0].sum() == rows.sum() * columns.sum()  # a box
            expected = torch.zeros(5)
            expected[number] += 1 - of_other[0].float().mean()
            expected[(number - 1) % 5] += of_other[0].float().mean()
            torch.testing.assert_close(share, expected)
            pasted += int(of_other[0].sum())
    assert pasted > 0


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_the_shares_are_of_the_distribution_that_is_asked_for(alpha: float) -> None:
    mixing, images, labels = Mixing(alpha, 0, 2), torch.zeros(2, 1, 1, 1), torch.arange(2)
    shares = torch.stack([mixed(mixing, images, labels, seed)[1][0, 0] for seed in range(1000)]).double()
    deviation = math.sqrt(1 / (4 * (2 * alpha + 1)))  # of Beta(alpha, alpha)
    assert abs(shares.mean() - 0.5) < SIGMAS * deviation / math.sqrt(1000)
    assert shares.std().item() == pytest.approx(deviation, rel=0.1)


def test_with_both_each_batch_has_one_of_the_two() -> None:
    mixing, images = Mixing(1, 1, 4), torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 9, 9).contiguous()
    added = [not mixed(mixing, images, torch.arange(4), seed)[0].frac().eq(0).all() for seed in range(200)]
    assert abs(sum(added) - 100) < SIGMAS * math.sqrt(200 / 4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_the_seed_decides_and_all_else_stays_as_it_is(memory_format: torch.memory_format) -> None:
    mixing, images = Mixing(0.4, 1, 6), torch.rand(6, 3, 8, 8).contiguous(memory_format=memory_format)
    before, labels, state = images.clone(), torch.arange(6), torch.get_rng_state()
    results = [mixed(mixing, images, labels, seed)[0] for seed in (1, 2, 1)]
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
    assert all(result.is_contiguous(memory_format=memory_format) for result in results)
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)


def test_a_single_image_stays_as_it_is() -> None:
    image = torch.rand(1, 3, 8, 8)
    for seed in range(10):
        found, shares = mixed(Mixing(0.4, 1, 3), image, torch.tensor([1]), seed)
        torch.testing.assert_close(found, image)
        torch.testing.assert_close(shares, torch.tensor([[0.0, 1, 0]]))


# -- in a run -------------------------------------------------------------------------------------------------------


class Noting(nn.Module):
    """The cross-entropy, which keeps what it is given in training, and how many labels evaluation has."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.evaluated: list[torch.Size] = []

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.given.append((logits.detach(), labels))
        else:
            self.evaluated.append(labels.shape)
        return F.cross_entropy(logits, labels)


def noted(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits (N, classes) and the labels (N, classes) of all passes since the last call."""
    assert isinstance(run.criterion, Noting)
    logits, labels = zip(*run.criterion.given, strict=True)
    run.criterion.given.clear()
    return torch.cat(logits), torch.cat(labels)


@pytest.mark.parametrize("way", ["mixup=0.4", "cutmix=1", "mixup=0.4 data.cutmix=1"])
def test_a_run_trains_on_shares_of_classes_and_is_judged_by_labels(way: str) -> None:
    run = run_of(*NOTED, *f"data.{way}".split())
    record = epoch(run)
    logits, shares = noted(run)
    assert shares.shape == (50, 4)
    torch.testing.assert_close(shares.sum(1), torch.ones(50))
    assert (shares.max(1).values < 1).sum() > 10
    losses = -(shares * logits.log_softmax(1)).sum(1)
    assert record["train_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert record["train_accuracy"] == pytest.approx((logits.argmax(1) == shares.argmax(1)).float().mean().item())
    assert isinstance(run.criterion, Noting)
    assert {tuple(shape) for shape in run.criterion.evaluated} == {(20,)}


def test_every_batch_is_mixed_in_shares_of_its_own_the_same_in_passes_and_in_another_run() -> None:
    whole, parts = run_of(*NOTED, "data.mixup=1"), run_of(*NOTED, "data.mixup=1", "batch_policy.max_micro_batch=6")
    seen = []
    for _ in range(2):
        epoch(whole), epoch(parts)
        labels = noted(whole)[1]
        torch.testing.assert_close(labels, noted(parts)[1])
        seen += [tuple(sorted({round(share, 4) for share in batch.unique().tolist()})) for batch in labels.split(16)]
    assert len(set(seen[:3] + seen[4:7])) == 6  # of two epochs, apart from the last batch of two images in each


def test_without_mixing_nothing_is_drawn_and_nothing_is_changed() -> None:
    run = run_of(*NOTED)
    assert run.mixing is None
    epoch(run)
    assert noted(run)[1].dtype == torch.long


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.mixup=-1"],
            r"data\.mixup=-1\.0: must be 0 \(none\), or the alpha of Beta\(alpha, alpha\), 0\.05 to 100",
        ),
        (["data.cutmix=0.01"], r"data\.cutmix=0\.01: must be 0 \(none\), or"),
        (["data.mixup=101"], r"data\.mixup=101\.0: must be 0 \(none\), or"),
        (["loss.label_smoothing=1"], r"loss\.label_smoothing=1\.0: must be 0 or more and below 1, as a share of each"),
        (["loss.label_smoothing=-0.1"], r"loss\.label_smoothing=-0\.1: must be 0 or more"),
        (
            ["data.mixup=0.2", "data.cutmix=1", "loss=custom", "loss._target_=torch.nn.MultiMarginLoss"],
            r"data\.mixup=0\.2 data\.cutmix=1: loss=torch\.nn\.MultiMarginLoss: called with logits \(2, 4\) and labels "
            r"\(2, 4\): .*; the labels of mixed images are shares of the classes, and data\.mixup=0 data\.cutmix=0",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        build_run(morphtrain.compose(*PLAIN, *overrides))
    assert "\n" not in str(refused.value)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["mixup", "cutmix"])
def test_a_gpu_is_not_waited_for(way: str) -> None:
    mixing, images, labels = Mixing(**{"mixup": 0, "cutmix": 0, way: 1}, num_classes=4), *_on_gpu()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, shares = mixed(mixing, images, labels, 1)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    expected, their_shares = mixed(mixing, images.cpu(), labels.cpu(), 1)
    torch.testing.assert_close(found.cpu(), expected)
    torch.testing.assert_close(shares.cpu(), their_shares)


def _on_gpu() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(8, 3, 8, 8).cuda().contiguous(memory_format=torch.channels_last), torch.arange(8).cuda() % 4


# -- smoothed labels ------------------------------------------------------------------------------------------------


def test_smoothed_labels_give_every_class_its_share() -> None:
    logits, labels = torch.randn(7, 4, dtype=torch.double), torch.arange(7) % 4
    loss = cross_entropy.build(CrossEntropy("cross_entropy", 0.3), num_classes=4)
    smoothed = 0.7 * F.one_hot(labels, 4) + 0.3 / 4
    expected = -(smoothed * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(loss(logits, labels), expected.mean())
    torch.testing.assert_close(
        loss(logits, smoothed), -((0.7 * smoothed + 0.3 / 4) * logits.log_softmax(1)).sum(1).mean()
    )
    each = unreduced(loss)  # which InfoBatch needs
    assert each is not None
    torch.testing.assert_close(each(logits, labels), expected)


def test_without_smoothing_the_loss_is_torchs_own() -> None:
    assert cross_entropy.build(CrossEntropy("cross_entropy", 0.0), num_classes=4) is F.cross_entropy


def test_a_checkpoint_from_before_there_was_smoothing_goes_on(tmp_path: Path) -> None:
    config = morphtrain.compose(*PLAIN, "epochs=1")
    train(config, tmp_path, {})
    stored = Checkpoint(tmp_path / "last.pt")
    del stored.facts["config"]["loss"]["label_smoothing"]
    assert stored.restore(config).epoch == 1
    with pytest.raises(UserError, match=r"loss\.label_smoothing=0\.1: .* was written with loss\.label_smoothing=0"):
        stored.restore(morphtrain.compose(*PLAIN, "epochs=1", "loss.label_smoothing=0.1"))
