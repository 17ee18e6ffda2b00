"""Networks to train: one module an option of the `model` group, and what options share."""

from morphtrain.model.alexnet import AlexNet
from morphtrain.model.mobilenet import MobileNet
from morphtrain.model.resnet import ResNet
from morphtrain.model.vgg import VGG

__all__ = ["VGG", "AlexNet", "MobileNet", "ResNet"]
