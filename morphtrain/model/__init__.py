"""Networks to train: one module per option of the `model` group."""

from morphtrain.model.alexnet import AlexNet
from morphtrain.model.mobilenet import MobileNet
from morphtrain.model.resnet import ResNet
from morphtrain.model.vgg import VGG

__all__ = ["VGG", "AlexNet", "MobileNet", "ResNet"]
