"""What differs between two configs, as it would be typed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morphtrain import schema
from morphtrain.wording import as_yaml

# Keys that may differ between a checkpoint and the run that goes on from it: they do not change what is computed.
FREE_KEYS = (
    "resume",
    "device",
    "processes",
    "process_timeout",
    "chosen",
    "objective",
    "trial",
    "tracking",
    "timing",
    "data.root",
    "data.download",
    "data.num_workers",
    "resume_schedule",
    "stop_at",
)


def differences(
    config: Mapping[str, Any], other: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> tuple[str, str]:
    """What decides a run and differs between two configs, as it would be typed for each; ("", "") if nothing does.

    A group with another option stands for all of its keys.

    Args:
        defaults: what `other` has for keys, in dots, that it lacks.
    """
    defaults = defaults or {}
    chosen = {group: _option(config.get(group)) for group in schema.OPTIONS}
    others = {group: _option(other.get(group)) or defaults.get(f"{group}.name") for group in schema.OPTIONS}
    groups = [group for group in schema.OPTIONS if chosen[group] != others[group]]
    here, there = flat(config), {**defaults, **flat(other)}
    for side, options_of_groups in ((here, chosen), (there, others)):
        side.update({group: options_of_groups[group] for group in groups})
    covered = tuple(f"{group}." for group in groups)
    different = sorted(key for key in {*here, *there} if here.get(key) != there.get(key))
    keys = [key for key in different if not key.startswith(covered) and not _is_free(key)]

    def typed(side: Mapping[str, Any]) -> str:
        return " ".join(f"{key}={as_yaml(side[key])}" if key in side else f"no {key}" for key in keys)

    return typed(here), typed(there)


def _option(node: Any) -> Any:
    return schema.option_of(node) if isinstance(node, dict) else None


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level of dotted keys."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key == "arguments" and "_target_" in config and isinstance(value, dict):
            result.update(flat(value, prefix))  # of the user's own part: keys of its group, as the user typed them
        elif isinstance(value, dict):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result
