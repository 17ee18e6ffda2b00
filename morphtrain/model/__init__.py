"""Networks to train: one module an option of the `model` group."""

from morphtrain.model.resnet import ResNet

__all__ = ["ResNet"]
