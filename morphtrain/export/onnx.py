"""ONNX, by torch's exporter on top of `torch.export`, read again in onnxruntime.

The input is `images` (batch, C, H, W), the output `logits` (batch, classes).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import nn

from morphtrain.errors import UserError
from morphtrain.export.trace import trace

SUFFIX = ".onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def encode(network: nn.Module, example: torch.Tensor) -> bytes:
    """The content of the file, weights included; `example` (B, C, H, W) is what the network is traced with.

    Raises:
        UserError: if a package is missing, or the network cannot be traced.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"format=onnx: {', '.join(missing)} not installed; pip install 'morphtrain[export]'")
    program = torch.onnx.export(
        trace(network, example),
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def decode(content: bytes, network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the file computes, on the CPU; `network` is not used."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
