"""Data sets: one module per option of the `data` group; each builds a `Data`."""

from morphtrain.contracts import Data
from morphtrain.data.images import ImageData, Images

__all__ = ["Data", "ImageData", "Images"]
