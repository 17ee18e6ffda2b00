"""The largest batch that memory allows, after every structural change (PruneTrain's dynamic mini-batch adjustment).

Lym et al. 2019 (arXiv 1901.09290), section 4.3: the memory that a pruned network no longer needs goes into a larger
batch, and batch size and learning rate grow by the same ratio.
The budget is that of each process, which has its share of a batch.
"""

from __future__ import annotations

import logging

import torch

from morphtrain import schema, slices, world
from morphtrain.batch_policy.learning_rate import grow
from morphtrain.batch_policy.sizes import tenth, without_single
from morphtrain.byte_sizes import byte_count, left_of, readable
from morphtrain.cost import MemoryModel, memory_model
from morphtrain.cost.step import casts_of
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.state import Run

log = logging.getLogger(__name__)


class FillMemory(Method):
    """Raise the batch size after structural changes; split batches that do not fit into passes that do."""

    def __init__(self, config: schema.batch_policy.FillMemory) -> None:
        self.config = config
        self.budget = 0.0  # bytes, for tensors, of each process

    def before_training(self, run: Run) -> None:
        self.budget = -world.largest(-usable_bytes(self.config, run.device))  # the least that any process has
        if run.epoch == 0:
            batch_size = self.config.batch_size
            run.set_batch(batch_size, self._micro_batch(memory_of(run), batch_size))
        elif run.history[-1].get("processes", 1) != world.size():  # the shares of the same batch are others
            run.set_batch(run.batch_size, self._micro_batch(memory_of(run), run.batch_size))

    def after_epoch(self, run: Run) -> None:
        if not run.change or run.epoch == run.config.epochs:
            return
        config, samples, memory = self.config, len(run.data.train), memory_of(run)
        fits = self._fitting(memory) * world.size()
        limits = {
            "the budget": fits,
            f"batch_policy.max_factor={config.max_factor:g}": int(run.batch_size * config.max_factor),
            "a tenth of the training set": tenth(samples),
        }
        run.set_batch(run.batch_size, self._micro_batch(memory, run.batch_size))
        batch_size = without_single(min(limits.values()), samples, config.multiple_of)
        if batch_size > run.batch_size:
            least = min(limits, key=lambda name: limits[name])
            needs = readable(memory.peak(max(slices.sizes(batch_size))))
            reason = f"{self._account(memory)}: {fits} fit, {least} allows {limits[least]}, needs {needs}"
            grow(run, batch_size, config.batch_size, config.lr_scaling, config.warmup_epochs, reason)

    def _micro_batch(self, memory: MemoryModel, batch_size: int) -> int | None:
        """How many of a process's share of `batch_size` images go through the network at once; None if all do."""
        fits = self._fitting(memory)
        if fits < 1:
            raise UserError(
                f"batch_policy.budget={self.config.budget}: not even one image fits: it takes "
                f"{readable(memory.peak(1))}; choose a larger budget or a smaller model"
            )
        if fits >= max(slices.sizes(batch_size)):
            return None
        account = self._account(memory)
        log.warning("batch size %d: in passes of at most %d images, which is what fits (%s)", batch_size, fits, account)
        return fits

    def _fitting(self, memory: MemoryModel) -> int:
        """How many images fit in each process; what they take may depend on the kind of CPU."""
        return int(-world.largest(-memory.largest_batch(self.budget)))

    def _account(self, memory: MemoryModel) -> str:
        return f"{readable(memory.fixed)} and {readable(memory.per_sample)} an image, of {readable(self.budget)}"


def memory_of(run: Run) -> MemoryModel:
    """The memory model of the run's training step."""
    return memory_model(
        run.model,
        run.data.input_shape,
        optimizer=run.optimizer,
        precision=casts_of(run.precision),
        averaged=run.config.ema is not None,
    )


def usable_bytes(config: schema.batch_policy.FillMemory, device: torch.device) -> float:
    """Bytes that the budget leaves for tensors; null: what a CUDA device has free or this process has reserved."""
    if config.budget is not None:
        budget = byte_count("batch_policy.budget", config.budget)
    elif device.type == "cuda":
        budget = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        raise UserError(
            f"batch_policy.budget=null: only a CUDA device says how much it has free; on {device} give a size, such as "
            "batch_policy.budget=2GiB"
        )
    return left_of("batch_policy.overhead", budget, config.overhead)


def build(config: schema.batch_policy.FillMemory) -> FillMemory:
    return FillMemory(config)
