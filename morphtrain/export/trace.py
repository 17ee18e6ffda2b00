"""A network as `torch.export` sees it: operations, without its classes, for a batch of any size."""

from __future__ import annotations

import torch
from torch import nn

from morphtrain.errors import UserError, first_line

HINT = "it takes a network that reads the batch size as x.shape[0] and does not branch on values"


def trace(network: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    """The program of `network` in its present mode; `example` (B, C, H, W) holds at least two images.

    Raises:
        UserError: for a network that torch.export does not take, or only for this batch size.
    """
    try:
        return torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    except Exception as error:
        raise UserError(f"torch.export does not take this network: {first_line(error)}; {HINT}") from error
