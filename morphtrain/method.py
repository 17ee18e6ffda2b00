"""The contract of a method: what the training loop calls, when, and in which order.

    after_build(run)                                # model and optimizer are made; change them here
    load_state_dict(state)                          # only in a resumed run
    before_training(run)
    for every epoch:
        before_epoch(run)
        for every batch:                            # clocked as epoch_seconds, up to `after_step`
            batch = before_forward(run, batch)      # then images are mixed, with `data.mixup` or `data.cutmix`
            with around_forward(run):               # every pass of the batch
                forward, loss
            backward (run.loss), clip_norm
            after_backward(run)                     # the gradients are complete
            step(run, closure)                      # or else the optimizer's own step
            after_step(run)                         # not if an overflow skipped the step; then averages (`ema`) follow
        metrics = after_epoch(run)                  # clocked as morph_seconds; change the network here
        after_change(run)                           # if a method has called run.shape_changed
        run.settle(), evaluation                    # batch norm's running statistics, for the weights as they are now;
                                                    # with `ema` also of the averaged network, see `run.averaged`
        metrics = measure(run)                      # not clocked
        record, checkpoint (state_dict)
    after_training(run)

Several processes go through all of this together, each with its own images of every batch, perhaps none. Losses and
gradients are those of whole batches, and torch's random numbers are the same in all processes, except in
`before_forward` and in the passes. So a hook that decides by these decides alike everywhere.

Each hook is called for all methods, in the order of `ORDER`, before the next hook is called. A method implements the
hooks it needs; a misspelt one is an error when the class is defined.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch

from morphtrain.contracts import Batch
from morphtrain.errors import UserError

if TYPE_CHECKING:
    from morphtrain.state import Run

# The batch policy comes last, so that it reacts to what the others changed; `methods` are the user's own. An optimizer
# may bring a method along. What they put around a forward pass lies within what `gradient` does, which acts on the
# layers as they are called in the end.
ORDER = ("prune", "grow", "gradient", "methods", "optimizer", "batch_policy")

PREFIXES = ("before_", "around_", "after_")  # of the names of hooks


class Closure(Protocol):
    """Computes the gradients of the present batch again, with the weights as they are now, and returns its loss."""

    def __call__(self, alone: bool = False) -> torch.Tensor:
        """`alone`: only those of the loss, clipped, without what methods add to them in `after_backward`."""


class Method:
    """A part of the training that prunes, grows, chooses batches, changes gradients or takes the step.

    Attributes:
        follows_channels: whether it needs the channel graph; if so, a network that cannot be traced is an error.
        ignore: patterns of module paths that the channel graph leaves out.
        penalty_weight: the factor on the penalty that it adds to the loss (lambda); None if it adds no
            penalty, or the weight is not known yet. Other methods may change it.
    """

    follows_channels: bool = False
    ignore: Sequence[str] = ()
    penalty_weight: float | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name in vars(cls):
            if name.startswith(PREFIXES) and name not in HOOKS:
                close = difflib.get_close_matches(name, HOOKS, n=1)
                hint = (f"did you mean {close[0]}? " if close else "") + f"there are {', '.join(HOOKS)}"
                raise UserError(f"{cls.__module__}.{cls.__qualname__}.{name}: the loop calls no such hook; {hint}")

    def after_build(self, run: Run) -> None:
        """Change `run.model` in place (parametrize its layers, compile it), or replace `run.optimizer`.

        The channels are followed after this, through the model as it is then, also through weights that are computed.
        The state of a checkpoint is loaded after this, too.
        """

    def before_training(self, run: Run) -> None:
        """Look at the run before its first epoch, or before the first one after it was resumed (run.epoch > 0).

        Raises:
            UserError: if the method cannot work on this run.
        """

    def before_epoch(self, run: Run) -> None:
        """Prepare for epoch `run.epoch`, which is about to start."""

    def before_forward(self, run: Run, batch: Batch) -> Batch | None:
        """Return another batch to train on, images (B, C, H, W) and labels (B,); None for the batch as it is.

        Several processes are each given their own images, perhaps none, and may return any number.
        """
        return None

    def around_forward(self, run: Run) -> AbstractContextManager[Any]:
        """A context of each forward pass of a training step, outside that of the precision (`torch.autocast`).

        One that sees layers (`morphtrain.layer_calls`) also sees those that the backward pass computes again.
        """
        return nullcontext()

    def after_backward(self, run: Run) -> None:
        """Look at `run.loss`, or change the gradients of the parameters."""

    def step(self, run: Run, closure: Closure) -> bool | None:
        """Take the step in the optimizer's place and return whether there was one; None leaves it to the others.

        Take every step by `run.precision.step(run.optimizer)`: with a loss scale gradients may have overflowed, and it
        returns whether there was a step. A plain `run.optimizer.step()` is refused then.
        """
        return None

    def after_step(self, run: Run) -> None:
        """React to a step that has just changed the weights."""

    def after_epoch(self, run: Run) -> Mapping[str, float] | None:
        """Change the network and report it with `run.shape_changed`; return metrics of the epoch just trained."""
        return None

    def after_change(self, run: Run) -> None:
        """Look up again whatever refers to parameters: the network has new ones."""

    def measure(self, run: Run) -> Mapping[str, float] | None:
        """Return metrics of the network after this epoch and its changes."""
        return None

    def after_training(self, run: Run) -> None:
        """Finish up: all epochs are done."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def implements(self, hook: str) -> bool:
        """Whether the class overrides this hook."""
        return getattr(type(self), hook) is not getattr(Method, hook)


HOOKS = tuple(name for name in vars(Method) if name.startswith(PREFIXES))
