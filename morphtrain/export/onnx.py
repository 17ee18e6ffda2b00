"""ONNX, by torch's exporter on top of `torch.export`, read again in onnxruntime.

The input is `images` (batch, C, H, W), the output `logits` (batch, classes). Nodes have the names of the network's
modules; what the file is about is in its metadata, where Netron shows it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from morphtrain import __version__
from morphtrain.errors import UserError
from morphtrain.export.about import About
from morphtrain.export.naming import name_by_modules
from morphtrain.export.trace import trace

SUFFIX = ".onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20


def encode(network: nn.Module, example: torch.Tensor, about: About) -> bytes:
    """The content of the file, weights included.

    Args:
        example: (B, C, H, W), what the network is traced with.
        about: what the file says of it.

    Raises:
        UserError: if a package is missing, or the network cannot be traced.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"format=onnx: {', '.join(missing)} not installed; pip install 'morphtrain[export]'")
    from onnx import checker

    program = torch.onnx.export(
        trace(network, example),
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    model: Any = program.model
    name_by_modules(model.graph)
    _describe(model, network, about)
    proto = program.model_proto
    checker.check_model(proto)
    content: bytes = proto.SerializeToString()
    return content


def _describe(model: Any, network: nn.Module, about: About) -> None:
    """Say in a model of onnx_ir what it is, where it comes from, and what its inputs and outputs are."""
    (given,), (made,) = model.graph.inputs, model.graph.outputs
    given.doc_string, made.doc_string = about.inputs, about.outputs
    model.doc_string = f"images: {about.inputs} logits: {about.outputs}"
    model.graph.name = type(network).__name__
    model.producer_name, model.producer_version = "morphtrain", __version__
    model.metadata_props.update(about.facts(network) | {"exporter": f"torch {torch.__version__}"})


def decode(content: bytes, network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the file computes, on the CPU; `network` is not used."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
