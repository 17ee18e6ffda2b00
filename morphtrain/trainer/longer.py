"""A run that goes on with more epochs than it was planned for (config key `resume_schedule`)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from morphtrain import options, schema
from morphtrain.contracts import Schedule
from morphtrain.errors import UserError
from morphtrain.schema.prune import Early

HINT = "resume_schedule=stretch or resume_schedule=append goes on with more epochs"


def is_longer(config: schema.Config, stored: Mapping[str, Any]) -> bool:
    """Whether `config` gives a run, written with config `stored`, more epochs and says what becomes of its schedule."""
    return config.resume_schedule is not None and config.epochs > stored["epochs"]


def cycles(config: schema.Config, stored: Mapping[str, Any], before: Sequence[int], done: int) -> list[int]:
    """The epochs after which the schedule begins again: those of `before`, with `append` also the end planned so far.

    Args:
        stored: the config that the run was written with, for fewer epochs.
        done: the last epoch that the run has trained.

    Raises:
        UserError: for a key whose end, a share of the epochs, has passed and would come again.
    """
    planned: int = stored["epochs"]
    _check_ends(config, planned, done)
    return list(before) if config.resume_schedule == "stretch" else [*before, planned]


def _check_ends(config: schema.Config, planned: int, done: int) -> None:
    data, new = config.data, config.epochs
    ends = {
        f"data.progressive_until={data.progressive_until:g}": (data.small_epochs(planned), data.small_epochs(new)),
        f"data.infobatch_until={data.infobatch_until:g}": (data.thinned_epochs(planned), data.thinned_epochs(new)),
    }
    if isinstance(config.prune, Early):
        cuts = (config.prune.cut_epochs(epochs) for epochs in (planned, new))
        ends[f"prune.by={config.prune.by:g}"] = tuple(some[-1] for some in cuts)  # type: ignore[assignment]
    for key, (before, now) in ends.items():
        goes_on = before > done and config.resume_schedule == "stretch"
        if now > done and now > before and not goes_on:
            was = f"it was epoch {before} with epochs={planned}, would be {now} with epochs={new}, and {done} are done"
            raise UserError(f"{key}: {was}; fewer epochs, or a new run of as many, works")


def schedule(config: schema.Config, begins: Sequence[int]) -> Schedule:
    """The schedule of a run that starts over after each of these epochs; each cycle lasts until the next one.

    Raises:
        UserError: for a schedule of the user's own that has a state, which cannot be set back to its beginning.
    """
    ends = [0, *begins, config.epochs]
    parts = [(start, _built(config, end - start)) for start, end in itertools.pairwise(ends)]
    if len(parts) > 1 and hasattr(parts[0][1], "state_dict"):
        name = f"schedule={config.schedule.name}"
        raise UserError(f"{name}: has a state, and cannot start over with resume_schedule=append; stretch works")

    def factor(epochs_done: float) -> float:
        start, part = next(found for found in reversed(parts) if found[0] <= epochs_done)
        return part(epochs_done - start)

    return parts[0][1] if len(parts) == 1 else factor


def _built(config: schema.Config, epochs: int) -> Schedule:
    built: Schedule = options.build("schedule", config.schedule, epochs=epochs)
    return built
