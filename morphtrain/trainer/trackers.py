"""What tracks a run: the option `tracking`, and those of `tracking.also` beside it."""

from __future__ import annotations

from morphtrain import options, schema
from morphtrain.schema import Config, Custom
from morphtrain.tracker import Tracker
from morphtrain.tracking.none import NoTracker
from morphtrain.tracking.several import Several, run_ids
from morphtrain.tracking.tolerant import Tolerant
from morphtrain.world import is_main


def tracker_of(config: Config, stored: str | None) -> Tracker:
    """The tracker of the config; in all processes but the first, one that keeps nothing.

    Args:
        stored: the tracker's `run_id` as the checkpoint has it that the run goes on from; None without one.
    """
    if not is_main():
        return NoTracker()
    main = config.tracking
    ids = run_ids(stored, main.name)
    tracker = _built(main, "tracking", ids.get(main.name))
    if isinstance(main, Custom) or not main.also:
        return tracker
    further = {option.name: _built(option, "tracking.also", ids.get(option.name)) for option in main.also}
    return Several({main.name: tracker, **further})


def _built(option: schema.Option | Custom, key: str, run_id: str | None) -> Tracker:
    """The tracker of a node below a key; a user's own is given no way to stop the run, or the others' work."""
    if isinstance(option, Custom):
        return Tolerant(option.name, options.build_custom("tracking", key, option, run_id=run_id))
    tracker: Tracker = options.build("tracking", option, run_id=run_id)
    return tracker
