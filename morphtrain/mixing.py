"""Mixed images: each image of a batch is a mixture of itself and of the one before it, and so is its label.

Mixup (Zhang et al. 2018, arXiv 1710.09412) adds the two images, in the shares lambda and 1 - lambda. CutMix (Yun et al.
2019, arXiv 1905.04899) pastes a box of the other image, whose share of the area is 1 - lambda. Lambda is drawn from
Beta(alpha, alpha), once for each batch. The label becomes the shares of the classes in the image. All of that is
torchvision's; what is here lets several processes mix a batch as one would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from morphtrain import world
from morphtrain.contracts import Batch, Loss
from morphtrain.errors import UserError
from morphtrain.part_checks import check_loss
from morphtrain.schema.data import Curriculum


class Mixing:
    """Mixes the images of batches.

    Args:
        mixup, cutmix: alpha of each; 0 for never. With both, one of them is drawn for each batch.
        num_classes: labels are 0 .. num_classes - 1.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        from torchvision.transforms import v2  # slow, and only needed here

        ways = {v2.MixUp: mixup, v2.CutMix: cutmix}
        self._mix = v2.RandomChoice([way(alpha=float(a), num_classes=num_classes) for way, a in ways.items() if a > 0])

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, counts: Sequence[int], seed: int) -> Batch:
        """Mixed images (B, C, H, W) in the memory format of `images`, and their shares of the classes (B, classes).

        Args:
            images: (B, C, H, W), this process's of a batch; there may be none.
            labels: (B,), int64.
            counts: how many images of the batch each process has, by rank.
            seed: of lambda and the box, the same in all processes. Torch's own random numbers stay as they are.
        """
        memory_format = _memory_format(images)
        several = world.size() > 1
        if several:
            images, labels = _led(images, labels, counts)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs', too
            images, shares = self._mix(images, labels)
        if several:
            images, shares = images[1:], shares[1:]
        return images.contiguous(memory_format=memory_format), shares


def _memory_format(images: torch.Tensor) -> torch.memory_format:
    """Theirs; what is in both formats, as images of one channel are, is contiguous."""
    if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _led(images: torch.Tensor, labels: torch.Tensor, counts: Sequence[int]) -> Batch:
    """A process's images, led by the one before them in the batch, that is by the last one of another process.

    Before the first image of a batch comes its last one.
    """
    if len(labels):
        last, its_label = images[-1:], labels[-1:]
    else:
        last, its_label = images.new_zeros(1, *images.shape[1:]), labels.new_zeros(1)
    lasts = world.stacked(last.contiguous())  # (processes, 1, C, H, W)
    their_labels = world.stacked(its_label)  # (processes, 1)
    ranks = [(world.rank() - step) % len(counts) for step in range(1, len(counts) + 1)]
    before = next(rank for rank in ranks if counts[rank])
    return torch.cat([lasts[before], images]), torch.cat([their_labels[before], labels])


def build(
    curriculum: Curriculum, num_classes: int, loss: Loss, device: torch.device, *, loss_name: str
) -> Mixing | None:
    """Mixing as `data.mixup` and `data.cutmix` say; None if both are 0.

    Args:
        loss_name: of this option, for messages.

    Raises:
        UserError: if the loss takes no shares of classes in place of labels.
    """
    alphas = {"mixup": curriculum.mixup, "cutmix": curriculum.cutmix}
    on = [f"data.{key}={alpha:g}" for key, alpha in alphas.items() if alpha > 0]
    if not on:
        return None
    try:
        check_loss(f"loss={loss_name}", loss, num_classes, device, mixed=True)
    except UserError as error:
        none = " ".join(f"{chosen.partition('=')[0]}=0" for chosen in on)
        raise UserError(
            f"{' '.join(on)}: {error}; the labels of mixed images are shares of the classes, and {none} mixes none"
        ) from error
    return Mixing(**alphas, num_classes=num_classes)
