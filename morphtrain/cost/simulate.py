"""A training step without values: which bytes are alive at each moment of it.

The one module that leans on torch's own tools for this, which may change between releases: fake tensors, which have a
shape and a device and no memory, and dispatch modes, which see every operation of forward, backward and optimizer.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from morphtrain import world
from morphtrain.cost.copies import Optimizing, copied
from morphtrain.cost.onednn import copied_bytes
from morphtrain.cost.step import Casts, backpropagate, blank_batch, update
from morphtrain.morph import Averages

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


class LiveBytes(TorchDispatchMode):
    """Notes after every operation how many bytes are held by the storages that were made while this mode was on.

    A storage counts from the operation that returns it until nothing refers to it any more, as an allocator that
    hands out exactly what is asked for would have it. What an operation needs inside and frees again does not count.
    A sum of gradients counts as a new tensor; autograd adds in place where it can, but not under a mode.

    Args:
        copies: whether convolutions copy what they read and write into a layout of their own, as oneDNN's do. These
            copies do count.
    """

    def __init__(self, copies: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies = copies
        self.now = 0
        self.moments: list[int] = []
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the storage of `tensor` for as long as it lives."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def release(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self.now += size
        self._alive[key] = weakref.ref(storage, release)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":  # `prim` only asks for devices and the like
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.hold(tensor)
            self.moments.append(self.now + (copied_bytes(func, args, result) if self.copies else 0))
        return result


class AnyValue(TorchDispatchMode):
    """Gives 1 to code that asks for a tensor's value: an optimizer's step has the same size whatever it computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        return func(*args, **(kwargs or {}))


def without_values(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor on the CPU, uninitialised. All is simulated there: autograd wants the driver of other devices."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


class SimulatedStep:
    """A training step whose optimizer has its state already, as all but the first have. The model is not changed.

    Args:
        model: on any device, in any mode; it is simulated in training mode.
        input_shape: of one sample, without the batch.
        optimizer: of the model's parameters, or what makes one of parameters.
        precision: what `torch.autocast` casts to, None for none; or a run's precision.
            Its loss scale does not count.
        device_type: of the device that trains; None: the model's. It decides whether optimizers work on all parameters
            at once, which takes room for their intermediate results, and whether convolutions copy what they read.
        averaged: whether there are averages of the weights, which follow the step (config key `ema`).
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        *,
        optimizer: Optimizing,
        precision: Casts,
        device_type: str | None = None,
        averaged: bool = False,
    ) -> None:
        self.averages = Averages() if averaged else None
        self.input_shape = tuple(input_shape)
        self.precision = precision
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        device_type = device_type or next(model.parameters()).device.type
        self._live = LiveBytes(copies=device_type == "cpu")
        with self._fake, self._live:
            self._model, self._optimizer = copied(model, optimizer, without_values)
        for group in self._optimizer.param_groups:
            if group.get("fused") and isinstance(self._optimizer, SGD):  # which torch cannot simulate
                group["fused"] = group["foreach"] = False
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = device_type != "cpu"  # torch's own choice, which goes by the parameters' device
        with self._fake, self._live:
            for parameter in self._model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            self._update()

    def _update(self) -> None:
        with AnyValue():
            update(self._model, self._optimizer, self.precision, self.averages)

    def live_bytes(self, batch_size: int) -> list[int]:
        """Bytes alive after each operation of a step of `batch_size` samples: weights and all.

        Raises:
            ValueError: for a network that cannot train on so few samples, or that decides by the values it computes.
        """
        self._live.moments = []
        try:
            with world.alone(), self._fake, self._live:
                images, labels = blank_batch(self._model, self.input_shape, batch_size)
                backpropagate(self._model, images, labels, self.precision)
                self._update()
        except NEEDS_VALUES as error:
            raise ValueError(f"the network asks for values, which a simulation has not: {error}") from error
        finally:
            self._optimizer.zero_grad()
        return self._live.moments
