"""Does a user's own part do what its contract says? Tried when a run is built, not found out an epoch later.

Each function raises a `UserError` that begins with `name`, the config key and its value.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain import world
from morphtrain.contracts import Batch, Data, DividedData, Loss, Precision, Schedule, SelectableData
from morphtrain.errors import UserError, said
from morphtrain.preprocessing import of_data
from morphtrain.wording import counted

TRIED = 16  # training images that are asked for in a certain order


def check_data(name: str, data: Data, chosen: bool = False) -> None:
    """Look at a batch of each set: training, validation, test if there is one.

    With `chosen`, the run will ask for chosen images (`data.infobatch`, `data.order`), if the data can give them.
    """
    if not isinstance(data, Data):
        raise UserError(f"{name}: its `to` returns a {type(data).__name__}; the data on the device are needed")
    if min(len(data.train), len(data.val)) < 1:
        raise UserError(f"{name}: has {len(data.train)} images for training and {len(data.val)} held out; 1 or more")
    try:
        of_data(data)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    makers: dict[str, Callable[[], Iterator[Batch]]] = {
        "train_batches": lambda: data.train_batches(2, torch.Generator().manual_seed(0)),
        "val_batches": data.val_batches,
    }
    rows = torch.arange(min(TRIED, len(data.train)))
    if chosen and isinstance(data, SelectableData):
        makers["train_batches_of"] = lambda: _of_rows(data, rows)
    if getattr(data, "test", None):
        makers["test_batches"] = lambda: data.test_batches()  # type: ignore[attr-defined]  # a missing one is reported
    for method, make in makers.items():
        images, labels = _tried(f"{name}: {method}", _first, make)
        count = len(images)
        check_tensor(f"{name}: {method} gives images", images, torch.float32, (count, *data.input_shape))
        check_tensor(f"{name}: {method} gives labels", labels, torch.long, (count,))
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= data.num_classes:
            raise UserError(f"{name}: {method} gives labels {low} to {high}; num_classes={data.num_classes} needs less")
    if chosen and isinstance(data, SelectableData):
        _check_order(f"{name}: train_batches_of", data, rows)
    if world.size() > 1 and is_divided(data):
        _check_slices(f"{name}: train_slices_of", data)


def _of_rows(data: SelectableData, rows: torch.Tensor) -> Iterator[Batch]:
    return data.train_batches_of(rows, len(rows), torch.Generator().manual_seed(0))


def _check_order(what: str, data: SelectableData, rows: torch.Tensor) -> None:
    """Ask for images in one order and in the other."""
    (_, labels), (_, turned) = (_tried(what, _first, lambda r=r: _of_rows(data, r)) for r in (rows, rows.flip(0)))
    if not torch.equal(labels, turned.flip(0)):
        raise UserError(f"{what} gives images in an order of its own; that of the rows it is asked for is needed")


def is_divided(data: Data) -> TypeGuard[DividedData]:
    """Whether a process can ask for its own images of every batch, and they come as whole batches do."""
    return isinstance(data, DividedData) and _goes_with(data, "train_slices_of", "train_batches", "train_batches_of")


def _check_slices(what: str, data: DividedData) -> None:
    """Ask for the first batch as several processes do."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(data.train), generator=generator)
    _, labels = _tried(what, _first, lambda: data.train_batches(2, torch.Generator().manual_seed(0)))
    _, own = _tried(what, _first, lambda: data.train_slices_of(rows, [slice(0, 2)], generator))
    if not torch.equal(labels, own):
        raise UserError(
            f"{what} gives other images than train_batches, whose order has to be torch.randperm of the generator "
            "(morphtrain.contracts.DividedData); without it every process makes whole batches"
        )


def check_selectable(key: str, name: str, data: Data, instead: str) -> None:
    """Raise a `UserError` unless one can ask for images, which the choice `key` needs; `instead` is what does not.

    Args:
        name: of the data.
    """
    if not isinstance(data, SelectableData) or not _goes_with(data, "train_batches_of", "train_batches"):
        raise UserError(
            f"{key}: data={name} has no train_batches_of(rows, batch_size, generator) beside its train_batches, "
            f"to give batches of chosen images (morphtrain.contracts.SelectableData); {instead}"
        )


def _goes_with(part: Any, method: str, *others: str) -> bool:
    """Whether a method of a part is not that of a base class which knows nothing of these other methods of the part."""
    own, *rest = (
        next((kind for kind in type(part).__mro__ if name in vars(kind)), object) for name in (method, *others)
    )
    return own is object or all(issubclass(own, other) for other in rest)


def check_precision(name: str, precision: Precision) -> None:
    """Raise a `UserError` unless several processes, if there are, can sum gradients before they are unscaled."""
    processes = world.size()
    if processes > 1 and not (hasattr(precision, "unscale") and _goes_with(precision, "unscale", "backward")):
        raise UserError(
            f"{name}: has no unscale(optimizer) beside its backward, and {processes} processes sum gradients before "
            "these are unscaled (morphtrain.contracts.Precision); one process needs none"
        )


def check_loss(name: str, loss: Loss, num_classes: int, device: torch.device, mixed: bool = False) -> None:
    """Call a copy of it with blank logits of two images; `mixed`: with shares of the classes in place of labels."""
    if isinstance(loss, nn.Module) and any(parameter.requires_grad for parameter in loss.parameters()):
        raise UserError(f"{name}: has parameters, which no optimizer trains; freeze them, or put them into the model")
    logits = torch.zeros(2, num_classes, requires_grad=True, device=device)
    labels = torch.zeros(2, dtype=torch.long, device=device)
    if mixed:
        labels = torch.full((2, num_classes), 1 / num_classes, device=device)
    what = f"{name}: called with logits (2, {num_classes}) and labels {tuple(labels.shape)}"
    value = _tried(what, copy.deepcopy(loss), logits, labels)
    if not isinstance(value, torch.Tensor) or value.dim() > 0 or not value.requires_grad:
        found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise UserError(f"{name}: returns {found}; the mean loss of the batch is needed, a scalar with a gradient")


def check_schedule(name: str, schedule: Schedule, epochs: int) -> None:
    """Ask for the factor at the start and in the middle of the run."""
    for done in (0.0, epochs / 2):
        factor: Any = _tried(f"{name}: after {counted(done, 'epoch')}", copy.deepcopy(schedule), done)
        if not isinstance(factor, Real) or not math.isfinite(factor) or factor < 0:
            raise UserError(f"{name}: gives {factor} after {counted(done, 'epoch')}; a factor of 0 or more is needed")


def check_optimizer(name: str, optimizer: Optimizer) -> None:
    """Look whether it takes steps of its own accord."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(f"{name}: its step needs a closure; a method of your own can give it one in its hook `step`")


def check_tensor(what: str, found: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise a `UserError` that begins with `what` unless `found` is a tensor of this type and shape."""
    wanted = f"a tensor {shape} of {str(dtype).removeprefix('torch.')} is needed"
    if not isinstance(found, torch.Tensor):
        raise UserError(f"{what} as a {type(found).__name__}; {wanted}")
    if found.dtype != dtype or tuple(found.shape) != shape:
        raise UserError(f"{what} {tuple(found.shape)} of {str(found.dtype).removeprefix('torch.')}; {wanted}")


def _first(make: Callable[[], Iterator[Batch]]) -> Batch:
    images, labels = next(iter(make()))
    return images, labels


def _tried(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:
        raise UserError(f"{what}: {said(error)}") from error
