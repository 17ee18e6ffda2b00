"""Stochastic gradient descent with momentum."""

from torch import nn
from torch.optim import SGD, Optimizer

from morphtrain import schema
from morphtrain.optimizer.fused import fused
from morphtrain.optimizer.groups import decay_groups


def build(config: schema.optimizer.SGD, model: nn.Module) -> Optimizer:
    optimizer = SGD(
        decay_groups(model, config.weight_decay),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )
    return fused(optimizer) if config.fused else optimizer
