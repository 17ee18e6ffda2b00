"""Write a network in another format, if what the file computes is what the network computes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from morphtrain.errors import UserError, first_line
from morphtrain.export import FORMATS, TOLERANCE
from morphtrain.export.about import About
from morphtrain.files import write_atomically
from morphtrain.morph import SHORT, copy_of, describe, exact, input_type, kept_modes
from morphtrain.morph.effective import folded
from morphtrain.preprocessing import Preprocessing

TRACED, COMPARED = 3, (1, 5)  # images in a batch that the network is traced with, and compared on


class Written(NamedTuple):
    """The files that `export` has written, the network first, and how far its outputs are from torch's."""

    files: list[Path]
    difference: float  # the largest of any output, as a share of the largest output


def export(
    network: nn.Module,
    output: Path,
    kind: str,
    preprocessing: Preprocessing,
    tolerance: float = TOLERANCE,
    run: Mapping[str, str] | None = None,
) -> Written:
    """Write `network` to `output`, and `preprocessing` as JSON beside it.

    What is written is first read again and compared on random images, in batches of two sizes. A network of 16 bits is
    written in 32, which hold all of its values: not every runtime computes in less. Weights that the network computes
    (weight norm) are written as plain ones.

    Args:
        network: on the CPU, images (B, C, H, W) to one tensor; what it computes in evaluation mode is exported.
        kind: one of `morphtrain.export.FORMATS`.
        preprocessing: its `input_shape` has to be known.
        tolerance: largest difference of any output, as a share of the largest output.
        run: facts about the run that the network came from, by name, which ONNX keeps as metadata.

    Raises:
        UserError: if the network cannot be exported, or the file computes something else; nothing is written then.
        OSError: if a file cannot be written.
    """
    if kind not in FORMATS:
        raise UserError(f"format={kind}: must be one of {', '.join(FORMATS)}")
    if preprocessing.input_shape is None:
        raise UserError("input_shape: the size of an image is not known; say it as in --input-shape 3,32,32")
    form = importlib.import_module(f"morphtrain.export.{kind}")
    network = _in_32_bits(network)
    with kept_modes(network):
        network.eval()
        batches = [_images(network, preprocessing.input_shape, count) for count in COMPARED]
        wanted = [_outputs(network, images) for images in batches]
        plain = folded(network)
        traced, about = _images(network, preprocessing.input_shape, TRACED), About(preprocessing, run or {})
        content = form.encode(plain, traced, about)
        decoded = form.decode(content, plain)
        difference = max(map(_difference, wanted, (_decoded(decoded, images) for images in batches)))
    if not difference <= tolerance:  # nor is NaN
        raise UserError(
            f"format={kind}: what it computes differs from the network by {difference:.2g} of the largest output; "
            f"tolerance={tolerance:g}"
        )
    name = output.name.removesuffix(form.SUFFIX) if output.name.endswith(form.SUFFIX) else output.stem
    beside = {"preprocessing": asdict(preprocessing)}
    if kind == "state_dict":
        beside["architecture"] = describe(plain)
    files = {output.with_name(f"{name}.{what}.json"): json.dumps(facts, indent=1) for what, facts in beside.items()}
    for path, text in files.items():
        write_atomically(path, text.encode())
    write_atomically(output, content)
    return Written([output, *files], difference)


def _in_32_bits(network: nn.Module) -> nn.Module:
    """The network itself, or a copy of one with tensors of 16 bits, in which these have 32."""
    if not any(tensor.dtype in SHORT for tensor in (*network.parameters(), *network.buffers())):
        return network
    wide = copy_of(network)
    for tensor in (*wide.parameters(), *wide.buffers()):
        tensor.data = exact(tensor.data)
    return wide


def _images(network: nn.Module, input_shape: Sequence[int], count: int) -> torch.Tensor:
    """Random images (count, C, H, W) in the network's number format."""
    dtype = input_type(network)
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, *input_shape, generator=generator).to(dtype)


@torch.no_grad()
def _outputs(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    try:
        found = network(images)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the network cannot take images of {tuple(images.shape[1:])}: {first_line(error)}") from error
    if not isinstance(found, torch.Tensor):
        raise UserError(f"the network returns a {type(found).__name__}; one that returns a tensor can be exported")
    return found


@torch.no_grad()
def _decoded(decoded: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    try:
        return decoded(images)
    except Exception as error:
        raise UserError(f"what was exported cannot take a batch of {len(images)}: {first_line(error)}") from error


def _difference(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference of an output, as a share of the largest output."""
    if found.shape != wanted.shape:
        raise UserError(f"what was exported gives {tuple(found.shape)}, the network {tuple(wanted.shape)}")
    return (found - wanted).abs().max().item() / (wanted.abs().max().item() or 1.0)
