"""The option `data=hf`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import check
from morphtrain.schema.data import Decoded


@dataclass(kw_only=True)
class HuggingFace(Decoded, option="hf"):
    """Tables, folders and sets of the hub that Hugging Face's `datasets` reads."""

    subset: str | None
    revision: str | None
    image: str | None
    label: str | None
    train_split: str
    val_split: str  # or auto
    test_split: str | None  # or auto
    val_share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("subset", "revision", "image", "label", "train_split", "val_split", "test_split"):
            check(getattr(self, key) != "", f"data.{key}", "", "a name")
        check(0 <= self.val_share <= 0.9, "data.val_share", self.val_share, "0 to 0.9")
        for key in ("val_split", "test_split"):
            other = getattr(self, key) != self.train_split
            check(other, f"data.{key}", self.train_split, "another split than data.train_split")
        other = self.val_split == "auto" or self.val_split != self.test_split
        check(other, "data.test_split", self.test_split, "another split than data.val_split")
