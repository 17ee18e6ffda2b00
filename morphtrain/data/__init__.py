"""Data sets: one module an option of the `data` group, each of which builds an `ImageData`."""

from morphtrain.data.images import ImageData, Images

__all__ = ["ImageData", "Images"]
