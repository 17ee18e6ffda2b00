"""Whether the processes of a run still have one and the same network.

check_replicas(run)    # raises a UserError that names what differs first
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from morphtrain import world
from morphtrain.errors import UserError
from morphtrain.morph import additions_of
from morphtrain.state import PARTS, Run

# What of a run decides how it goes on, besides what has a state of its own.
PLAIN = ("epoch", "progress", "batch_size", "micro_batch", "lr_factor", "stopped", "change", "chosen", "train_loss")
RAMPS = ("lr_scale", "rewarmed", "growths")
PLAIN_TYPES = (bool, int, float, str, bytes, type(None), list, tuple)

Digests = dict[str, bytes]  # by name, in order


def check_replicas(run: Run) -> None:
    """Compare what all processes have of a run: to the bit, by digests, of which one goes to the others.

    Nothing but the same computations on the same numbers keeps the replicas of the network equal. What is compared are
    parameters, buffers, the states of optimizer, number format and methods, and how far the run is. Call it where
    buffers are agreed on. One process compares nothing.

    Raises:
        UserError: in all processes, if they differ; it names the first tensor or value that does, and where.
    """
    if world.size() == 1:
        return
    mine = digests(run)
    whole = hashlib.sha256(b"".join(name.encode() + digest for name, digest in mine.items())).digest()
    if len(set(world.gathered(whole))) > 1:
        name, ranks = _first_difference(world.gathered(mine))
        raise UserError(
            f"after epoch {run.epoch} the processes have different networks: {name} is another one in rank "
            f"{', '.join(map(str, ranks))} than in rank 0; what a method measures or draws has to go through "
            "morphtrain.world.agree"
        )


def digests(run: Run) -> Digests:
    """A digest of each tensor and value of a run that all processes have to have alike, by name."""
    return {name: _digest(value) for name, value in _leaves(run)}


def _first_difference(everyone: Sequence[Digests]) -> tuple[str, list[int]]:
    """The first name, in rank 0's order, whose digest others do not have, or that only others have; and their ranks."""
    names = dict.fromkeys(name for found in everyone for name in found)
    for name in names:
        ranks = [rank for rank, found in enumerate(everyone) if found.get(name) != everyone[0].get(name)]
        if ranks:
            return name, ranks
    return "the order of its tensors", list(range(1, len(everyone)))


def _leaves(run: Run) -> Iterator[tuple[str, Any]]:
    """All tensors and other values, with their names."""
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    for parameter, name in names.items():
        yield f"parameter {name}", parameter
        yield f"requires_grad of {name}", parameter.requires_grad
    for name, buffer in run.model.named_buffers():
        yield f"buffer {name}", buffer
    for number, group in enumerate(run.optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter not in names:
                names[parameter] = f"optimizer group {number}, {place}"  # such as a method's own
                yield f"parameter {names[parameter]}", parameter
            name = names[parameter]
            yield from _within(f"optimizer state of {name}", run.optimizer.state.get(parameter, {}))
        settings = {key: value for key, value in group.items() if key != "params"}
        yield from _within(f"optimizer group {number}", settings)
    yield from _within("precision", run.precision.state_dict())
    for name, method in run.methods.items():
        yield from _within(f"state of {name}", method.state_dict())
    for part in PARTS:
        if hasattr(getattr(run, part), "state_dict"):
            yield from _within(f"state of {part}", getattr(run, part).state_dict())
    numbers = additions_of(run.optimizer).numbers
    yield from _within("additions", {name: numbers[p] for p, name in names.items() if p in numbers})
    values = run.averages.values
    yield from _within("average", {name: values[p] for p, name in names.items() if p in values})
    for key in (*PLAIN, *RAMPS):
        yield f"run.{key}", getattr(run, key)


def _within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors in a state, and what else there is, with their places."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _within(f"{name}: {key}", part)
    elif isinstance(value, (list, tuple)) and any(isinstance(part, (torch.Tensor, Mapping, list)) for part in value):
        for number, part in enumerate(value):
            yield from _within(f"{name}[{number}]", part)
    elif isinstance(value, (torch.Tensor, *PLAIN_TYPES)):  # others may show where they are in memory
        yield name, value


def _digest(value: Any) -> bytes:
    if not isinstance(value, torch.Tensor):
        return hashlib.sha256(repr(value).encode()).digest()[:8]
    kind = f"{value.dtype} {tuple(value.shape)}".encode()
    values = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found = hashlib.sha256(kind)
    found.update(values.numpy().data)
    return found.digest()[:8]
