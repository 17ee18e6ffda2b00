"""Statistics of activations, measured by forward passes that leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from morphtrain.morph.modes import kept_buffers, kept_modes


class Statistics(NamedTuple):
    """Mean and (biased) variance of each channel, (C,), over batches and positions, as batch norm computes them."""

    mean: torch.Tensor
    var: torch.Tensor

    def of(self, entries: slice) -> Statistics:
        """Those of some of the channels."""
        return Statistics(self.mean[entries], self.var[entries])


@torch.no_grad()
def measure_inputs(
    model: nn.Module,
    paths: Sequence[str],
    batches: Iterable[Any],
    outputs: bool = False,
    of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, Statistics]:
    """The statistics of what enters the modules at `paths`, with `model` in training mode.

    Modes, buffers and the random state are left as they were.

    Args:
        batches: inputs of the model; each is a tensor, or a tuple of tensors for a model of several inputs.
        outputs: measure what leaves the modules instead.
        of: measure what this makes of the tensors (B, C, H, W); None: the tensors.

    Returns:
        the statistics by path, each the mean over the batches.
    """
    sums: dict[str, list[torch.Tensor]] = {path: [] for path in paths}

    def add(path: str, x: torch.Tensor) -> None:
        x = x.detach().double() if x.device.type != "mps" else x.detach().float()
        x = x if of is None else of(x)
        sums[path].append(torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)]))

    hooks = []
    for path in paths:
        module = model.get_submodule(path)
        if outputs:
            hooks.append(module.register_forward_hook(lambda m, args, out, path=path: add(path, out)))
        else:
            hooks.append(module.register_forward_pre_hook(partial(_entering, add, path), with_kwargs=True))
    try:
        with restored(model):
            model.train()
            for batch in batches:
                model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
    finally:
        for hook in hooks:
            hook.remove()
    return {path: Statistics(*torch.stack(found).mean(0)) for path, found in sums.items()}


def _entering(add: Callable[[str, torch.Tensor], None], path: str, m: Any, args: Any, kwargs: Any) -> None:
    add(path, args[0] if args else kwargs["input"])


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore modes, buffers and the random state when the block ends."""
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with kept_modes(model), kept_buffers(model), torch.random.fork_rng(devices=devices):
        yield
