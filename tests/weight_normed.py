"""Networks with weight norm, and what their layers are made of."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import densenet121, shufflenet_v2_x0_5

from morphtrain.model import ResNet
from morphtrain.model.alexnet import AlexNet
from morphtrain.model.mobilenet import MobileNet
from morphtrain.model.vgg import VGG
from morphtrain.morph import MIXING
from morphtrain.morph.effective import fold
from morphtrain.norm.weight import to_weight_norm


class Own(nn.Module):
    """A user's network: a layer that is called twice, a transposed and a grouped convolution, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 5, 2, bias=False)
        self.head = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU())
        self.tied, self.untied = nn.Linear(7, 7), nn.Linear(7, 7)
        self.untied.weight = self.tied.weight
        self.last = nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(self.twice(F.relu(self.twice(x))))
        x = self.up(F.relu(self.grouped(x))).mean((2, 3))
        return self.last(self.untied(F.relu(self.tied(self.head(x)))))


NETWORKS = {
    "resnet A": lambda: ResNet(blocks=2, width=8),
    "resnet B": lambda: ResNet(blocks=1, width=8, shortcut="B", bottleneck=True, layers=3),
    "vgg": lambda: VGG(depth=8, width=8),
    "alexnet": AlexNet,
    "mobilenet_v1": lambda: MobileNet(version=1, width_multiplier=0.25),
    "mobilenet_v2": lambda: MobileNet(version=2, width_multiplier=0.25),
    "shufflenet": lambda: shufflenet_v2_x0_5(num_classes=10),
    "densenet": lambda: densenet121(num_classes=10),
    "own": Own,
}
SLOW = ("densenet",)


def normed(model: nn.Module, mean_only: bool = False) -> nn.Module:
    """The network with weight norm, and lengths and directions unlike those that it starts with."""
    to_weight_norm(model, mean_only)
    with torch.no_grad():
        for layer in layers_of(model):
            g, v = parts(layer)
            g.mul_(torch.empty_like(g).uniform_(0.5, 2) * torch.where(torch.rand_like(g) < 0.3, -1.0, 1.0))
            v.mul_(torch.empty_like(g).uniform_(0.3, 3))
            if layer.bias is not None:
                layer.bias.normal_(0, 0.1)
    return model


def layers_of(model: nn.Module) -> list[Any]:
    """The layers with weight norm."""
    return [m for m in model.modules() if isinstance(m, MIXING) and "weight" in getattr(m, "parametrizations", ())]


def parts(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """g and v."""
    computed = layer.parametrizations["weight"]
    return computed.original0, computed.original1


def folded(model: nn.Module) -> nn.Module:
    """The same network with plain weights."""
    twin = copy.deepcopy(model)
    fold(twin)
    return twin
