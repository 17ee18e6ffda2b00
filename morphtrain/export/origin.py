"""What an exported file says of the run that it came from."""

from __future__ import annotations

from typing import Any

from morphtrain.plain_data import mismatch
from morphtrain.trainer.checkpoint import RUN_FACTS
from morphtrain.trainer.stored_network import StoredNetwork
from morphtrain.wording import printable

METRICS = ("val_accuracy", "test_accuracy")


def origin(stored: StoredNetwork) -> dict[str, str]:
    """What tells a checkpoint's run apart, and how accurate it was then; nothing if the file is a network's alone.

    Neither paths nor hosts are among it, for an exported network is given away.
    """
    facts = stored.facts
    if mismatch(facts, RUN_FACTS, "facts") or not facts["history"]:
        return {}
    config, record = facts["config"], facts["history"][-1]
    found = {
        "model": _option(config.get("model")),
        "data": _option(config.get("data")),
        "seed": config.get("seed"),
        "epoch": facts["epoch"],
        **{name: record.get(name) for name in METRICS},
        "id": facts["tracking_id"],
    }
    return {f"run.{name}": printable(str(value)) for name, value in found.items() if value is not None}


def _option(group: Any) -> Any:
    """The name of a group's option, or the class of one's own."""
    return group.get("name", group.get("_target_")) if isinstance(group, dict) else None
