"""Data sets: one module an option of the `data` group, each of which builds a `Data`."""

from morphtrain.contracts import Data
from morphtrain.data.images import ImageData, Images

__all__ = ["Data", "ImageData", "Images"]
