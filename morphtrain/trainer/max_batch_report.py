"""Memory of a network's training step, the largest batch within a budget, and the smallest one that is fast."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from morphtrain import options, schema
from morphtrain.byte_sizes import readable
from morphtrain.cost.max_batch import fitting_batch
from morphtrain.cost.memory import NOT_MODELLED, MemoryModel, fitted
from morphtrain.cost.simulate import SimulatedStep
from morphtrain.cost.step import casts_of
from morphtrain.cost.throughput import knee, throughput
from morphtrain.cost.verify import Verified, verify_batch
from morphtrain.errors import UserError
from morphtrain.memory_limit import named_if_out_of_memory
from morphtrain.outputs import check_outputs
from morphtrain.trainer import trained
from morphtrain.trainer.build import build_model, in_format
from morphtrain.trainer.devices import pick_device

# (C, H, W) and number of classes of data sets, known without loading them.
PUBLISHED = {
    "mnist_5000": ((1, 28, 28), 10),
    "fashion_mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}
DIGITS = 10


def show_max_batch(config: schema.MaxBatch, choices: Sequence[str]) -> int:
    """Print the memory model of the config's network, the largest batch, and the speed by batch size; return the batch.

    Args:
        config: a checked config (`morphtrain.schema.parse_max_batch`).
        choices: the chosen options, for the first line, such as `model=resnet32`.

    Raises:
        UserError: if the network cannot be made or does not fit the images, or no batch fits the budget.
    """
    device, here = pick_possible_device(config.device)
    model, input_shape, num_classes = _network(config, device if here else torch.device("cpu"))
    settings = _settings(config, model, device, here)
    print(f"{' '.join(choices)} device={device.type}, images {input_shape}, {num_classes} classes")
    step, memory = _simulated(config, model, input_shape, device, settings)
    _show_model(memory)
    usable = config.usable_bytes
    print(f"budget {readable(config.budget_bytes)}, less overhead={config.overhead}: {readable(usable)} for tensors")
    batch_size = int(_or_user_error("budget", config.budget, lambda: fitting_batch(step, memory, usable)))
    peak = memory.peak(batch_size)
    print(f"largest batch: {batch_size}; its step takes {readable(peak)}, {readable(usable - peak)} are left")
    print(f"not modelled: {NOT_MODELLED}")
    if here and device.type == "cuda":
        batch_size = _show_verified(config, model, input_shape, batch_size, settings)
    else:
        print("not verified: real steps are tried on a CUDA device only")
    if not here:
        print(f"speed not measured: no {device.type} here")
    elif config.throughput_seconds:
        _show_speed(config.throughput_seconds, model, input_shape, batch_size, settings)
    return batch_size


def _network(config: schema.MaxBatch, device: torch.device) -> tuple[nn.Module, tuple[int, ...], int]:
    """The config's network, on `device`, the shape of its images and the number of its classes."""
    input_shape, num_classes = images_of(config)
    given = {"num_classes": num_classes, "in_channels": input_shape[0]}
    model = build_model(config.model, lambda: options.build("model", config.model, **given), config.norm, seed=0)
    if config.model.weights is not None:  # what was pruned takes less memory
        model = trained.into(trained.find(config), model, config, num_classes, input_shape[0], seed=0, structure=True)
    with named_if_out_of_memory(f"{schema.size_keys('model', config.model)} input_shape={list(input_shape)}"):
        model = in_format(model.to(device), config.memory_format)
        check_outputs(f"model={config.model.name}", model, input_shape, num_classes)
    return model, input_shape, num_classes


def _settings(config: schema.MaxBatch, model: nn.Module, device: torch.device, here: bool) -> dict[str, Any]:
    """Optimizer, precision and averages as keywords of `morphtrain.cost`."""
    with warnings.catch_warnings():
        if not here:
            warnings.simplefilter("ignore")  # a loss scaler warns if its GPU is missing
        precision = options.build("precision", config.precision, device=device)
    optimizer = options.build("optimizer", config.optimizer, model=model)
    if hasattr(precision, "prepare"):
        precision.prepare(model, optimizer)
    return {"optimizer": optimizer, "precision": casts_of(precision), "averaged": config.ema is not None}


def pick_possible_device(wanted: str) -> tuple[torch.device, bool]:
    """The device of key `device`, and whether this machine has that kind; memory can be estimated even if not."""
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = wanted.partition(":")[0]
    if kind in ("auto", "cpu") or (found is not None and found.type == kind):
        return pick_device(wanted), True
    return torch.device(wanted), False


def images_of(config: schema.MaxBatch) -> tuple[tuple[int, ...], int]:
    """(C, H, W) and the number of classes, from the keys or else from what is known of the data option.

    Raises:
        UserError: if neither says.
    """
    known_shape, known_classes = _known_images(config.data)
    input_shape = tuple(config.input_shape) if config.input_shape is not None else known_shape
    num_classes = config.num_classes if config.num_classes is not None else known_classes
    if input_shape is None:
        raise UserError(f"input_shape=null: not known for data={config.data.name}; give it, such as [3,32,32]")
    if num_classes is None:
        raise UserError(f"num_classes=null: not known for data={config.data.name}; give it")
    return input_shape, num_classes


def _known_images(data: Any) -> tuple[tuple[int, ...] | None, int | None]:
    if isinstance(data, (schema.data.Mnist5000, schema.data.Downloaded)):
        return PUBLISHED[data.name]
    if isinstance(data, schema.data.Digits):
        return (1, data.image_size, data.image_size), DIGITS
    if isinstance(data, schema.data.Synthetic):
        return (data.in_channels, data.image_size, data.image_size), data.num_classes
    if isinstance(data, schema.data.Decoded):
        return (3, data.image_size, data.image_size), None
    return None, None


def _simulated(
    config: schema.MaxBatch,
    model: nn.Module,
    input_shape: tuple[int, ...],
    device: torch.device,
    settings: dict[str, Any],
) -> tuple[SimulatedStep, MemoryModel]:
    def simulate() -> tuple[SimulatedStep, MemoryModel]:
        step = SimulatedStep(model, input_shape, device_type=device.type, **settings)
        return step, fitted(step)

    step, memory = _or_user_error("model", config.model.name, simulate)
    return step, memory


def _or_user_error(key: str, value: object, compute: Callable[[], Any]) -> Any:
    """What `compute` returns; a ValueError of the library, which knows no keys, becomes a `UserError` naming `key`."""
    try:
        return compute()
    except ValueError as error:
        raise UserError(f"{key}={value}: {error}") from error


def _show_model(memory: MemoryModel) -> None:
    line = f"{readable(memory.fixed)} + {readable(memory.per_sample)} a sample"
    print(f"a training step takes {line}  ({memory.fixed:.0f} + {memory.per_sample:.0f} * batch bytes)")
    if memory.peak(1) > memory.fixed + memory.per_sample + 1:
        print(f"  but {readable(memory.peak(1))} at batch 1: with few samples the step peaks at another moment")
    if not memory.exact:
        print("  an approximation: what this network does depends on the batch")


def _show_verified(
    config: schema.MaxBatch, model: nn.Module, input_shape: tuple[int, ...], guess: int, settings: dict[str, Any]
) -> int:
    budget = config.usable_bytes
    found: Verified = _or_user_error(
        "budget", config.budget, lambda: verify_batch(model, input_shape, budget, guess=guess, **settings)
    )
    print(
        f"verified: {found.batch_size}, by two steps in each of {len(found.trials)} fresh processes; "
        f"{readable(found.margin_bytes)} are left, allocator retries {found.retries}"
    )
    return found.batch_size


def _show_speed(
    seconds: float, model: nn.Module, input_shape: tuple[int, ...], largest: int, settings: dict[str, Any]
) -> None:
    sizes = [*(2**power for power in range(1, largest.bit_length()) if 2**power < largest), largest]
    rates = throughput(model, input_shape, sizes, seconds, **settings)
    print("samples a second by batch: " + ", ".join(f"{size}: {rate:.4g}" for size, rate in rates.items()))
    best = knee(rates)
    print(f"the smallest batch within 5 % of the fastest: {best}")
    if largest not in rates:
        print(f"  batches above {max(rates)} were not measured within throughput_seconds={seconds:g}")
