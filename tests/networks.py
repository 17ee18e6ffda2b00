"""What the tests of channel surgery share: networks, and the masked network that a sliced one has to equal."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph, Space

PRESETS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet56": 9}
SHAPES = {
    "plain A": {"shortcut": "A"},
    "plain B": {"shortcut": "B"},
    "bottleneck A": {"shortcut": "A", "bottleneck": True, "layers": 3},
    "bottleneck B": {"shortcut": "B", "bottleneck": True, "layers": 3},
}
OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, amsgrad=True),
}

INPUT = torch.randn(4, 3, 8, 8, dtype=torch.double)
LABELS = torch.tensor([0, 1, 2, 3])


def build(blocks: int = 1, width: int = 4, **options: object) -> nn.Module:
    """A small network in double precision with norm statistics that are not those of a fresh one."""
    model = ResNet(blocks=blocks, width=width, **options).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def trace(model: nn.Module) -> ChannelGraph:
    return ChannelGraph.trace(model, INPUT[:1])


def step(model: nn.Module, optimizer: Optimizer) -> None:
    F.cross_entropy(model(INPUT), LABELS).backward()
    optimizer.step()
    optimizer.zero_grad()


def outputs(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network computes in training and in evaluation mode; buffers are put back."""
    buffers = copy.deepcopy(dict(model.named_buffers()))
    mode = model.training
    with torch.no_grad():
        training = model.train()(INPUT)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        evaluation = model.eval()(INPUT)
    model.train(mode)
    return training, evaluation


@torch.no_grad()
def mask(space: Space, dropped: torch.Tensor) -> None:
    """Set what makes and what uses the `dropped` channels (indices) to zero, leaving every shape as it is."""
    for slot in space.slots:
        if not slot.has_weights:
            continue
        entries = (slot.start + dropped[:, None] * slot.segment.span + torch.arange(slot.segment.span)).flatten()
        for name, dim in slot.axis.tensors:
            getattr(slot.axis.module, name).index_fill_(dim, entries, 0.0)


def twin(model: nn.Module, make_optimizer, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """A copy of a network and of its optimizer's state."""
    other = copy.deepcopy(model)
    other_optimizer = make_optimizer(other.parameters())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, other_optimizer
