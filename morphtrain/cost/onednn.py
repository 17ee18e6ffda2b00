"""The copies that oneDNN's convolutions make on a CPU: NCHW tensors in blocks of as many channels as a vector holds.

Found by watching what torch's allocator hands out inside a convolution (torch 2.14, AVX-512). In channels_last, the
convolutions read and write tensors as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from morphtrain.morph.formats import format_of

BLOCKS = {"AVX512": 16, "AVX2": 8}  # channels; on other processors a copy is as large as its tensor
FEW_CHANNELS = 8  # inputs of at most so many are not copied for kernels larger than 1x1


def copied_bytes(func: Any, args: Sequence[Any], result: Any) -> int:
    """Bytes that aten's operation `func` holds at its fullest moment, beyond its arguments and its result."""
    if func is torch.ops.aten.convolution.default:
        inputs, weight = args[:2]
        return 0 if _channels_last(inputs, weight) else _forward(inputs, weight, result)
    if func is torch.ops.aten.convolution_backward.default:
        gradient, inputs, weight, _, stride = args[:5]
        if not _channels_last(inputs, weight):
            return _backward(gradient, inputs, weight, result[0], strided=max(stride) > 1)
    return 0


def _forward(inputs: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> int:
    """Copies of input and output first; then the input's is gone and the output itself is there."""
    written = _blocked(output)
    return max(_read(inputs, weight) + written - output.nbytes, written)


def _backward(
    gradient: torch.Tensor,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    input_gradient: torch.Tensor | None,
    strided: bool,
) -> int:
    """First the copies in which the input's gradient is computed; then, with it in memory, those for the weight's."""
    first, written = 0, _blocked(gradient)
    if input_gradient is not None and strided:
        first = 2 * input_gradient.nbytes  # in channels_last, and two steps from there
    elif input_gradient is not None:
        first = written + _blocked(inputs) - input_gradient.nbytes
    return max(first, written + _read(inputs, weight)) + weight.nbytes


def _read(inputs: torch.Tensor, weight: torch.Tensor) -> int:
    few = inputs.shape[1] <= FEW_CHANNELS and weight[0, 0].numel() > 1
    return 0 if few else _blocked(inputs)


def _blocked(tensor: torch.Tensor) -> int:
    """Bytes of the tensor with its channels filled up to whole blocks."""
    block = BLOCKS.get(torch.backends.cpu.get_cpu_capability(), 1)
    channels = tensor.shape[1]
    return tensor.nbytes * (-(-channels // block) * block) // channels


def _channels_last(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the convolution works in channels_last: it does if one of the two lies so."""
    return torch.channels_last in (format_of(inputs), format_of(weight))
