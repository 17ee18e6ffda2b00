"""AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101)."""

from torch import nn
from torch.optim import AdamW, Optimizer

from morphtrain import schema
from morphtrain.optimizer.fused import fused
from morphtrain.optimizer.groups import decay_groups


def build(config: schema.optimizer.AdamW, model: nn.Module) -> Optimizer:
    beta1, beta2 = config.betas
    optimizer = AdamW(decay_groups(model, config.weight_decay), lr=config.lr, betas=(beta1, beta2), eps=config.eps)
    return fused(optimizer) if config.fused else optimizer
