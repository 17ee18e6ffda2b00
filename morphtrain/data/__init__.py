"""Data sets: one module an option of the `data` group, each of which builds a `Data`."""

from morphtrain.data.images import ImageData, Images
from morphtrain.data.protocol import Data

__all__ = ["Data", "ImageData", "Images"]
