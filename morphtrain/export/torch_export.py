"""torch.export: `torch.export.load(path).module()` is the network, without its code or MorphTrain's."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from torch import nn

from morphtrain.export.about import About
from morphtrain.export.trace import trace

SUFFIX = ".pt2"


def encode(network: nn.Module, example: torch.Tensor, about: About) -> bytes:
    """The content of the file; `example` (B, C, H, W) is what the network is traced with, `about` is not used.

    Raises:
        UserError: if it cannot be traced.
    """
    buffer = io.BytesIO()
    torch.export.save(trace(network, example), buffer)
    return buffer.getvalue()


def decode(content: bytes, network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the file computes; `network` is not used."""
    loaded: Callable[[torch.Tensor], torch.Tensor] = torch.export.load(io.BytesIO(content)).module()
    return loaded
