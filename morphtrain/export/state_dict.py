"""A plain state dict, for those who have the network's code; its structure is in the `.architecture.json` beside it.

network = morphtrain.morph.rebuild(Net(), json.loads(Path("net.architecture.json").read_text()))
network.load_state_dict(torch.load("net.state_dict.pt", weights_only=True))

A network that computes some of its weights (weight norm) gets plain ones first: `morphtrain.morph.effective.fold(net)`.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from torch import nn

from morphtrain.export.about import About
from morphtrain.morph import copy_of

SUFFIX = ".state_dict.pt"


def encode(network: nn.Module, example: torch.Tensor, about: About) -> bytes:
    """The content of the file; `example` and `about` are not used."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.getvalue()


@torch.no_grad()
def decode(content: bytes, network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the structure of `network` computes with the values in the file."""
    bare = copy_of(network)
    for tensor in bare.state_dict().values():
        tensor.zero_()
    bare.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return bare
