"""A trial's overrides as those of a single run: what a preset such as `+sweep=prunetrain` has set is spelled out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from morphtrain import schema
from morphtrain.arguments import OF_A_MULTIRUN
from morphtrain.wording import as_yaml

NOT_TRAINED = ("hydra", "trial")  # what says where and as which trial a job runs, not what it trains


def single_run(
    overrides: Sequence[str], loader: ConfigLoader, name: str | None, paths: Sequence[str] = ()
) -> list[str]:
    """Overrides that compose the same run without the presets of a multirun.

    Args:
        overrides: of a job of the multirun.
        loader: Hydra's, with the search path of the multirun.
        name: of the main config.
        paths: the override `hydra.searchpath=[...]`, if it was typed.
    """
    plain = [override for override in overrides if _key(override) not in OF_A_MULTIRUN]
    if len(plain) == len(overrides):
        return plain

    def composed(given: Sequence[str]) -> DictConfig:
        return loader.load_configuration(name, [*given, *paths], RunMode.RUN, from_shell=False)

    wanted = composed([*overrides, "hydra.mode=RUN"])
    usual = composed([override for override in plain if _key(override) in schema.OPTIONS]).hydra.runtime.choices
    chosen = wanted.hydra.runtime.choices
    options = [f"{group}={chosen[group]}" for group in schema.OPTIONS if chosen[group] != usual[group]]
    found = composed([*options, *plain])
    return [*options, *plain, *_differences(_plain(wanted), _plain(found))]


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _plain(config: DictConfig) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(config, resolve=False)
    return {key: value for key, value in plain.items() if key not in NOT_TRAINED}


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """The overrides that make `wanted` of `found`."""
    for key, value in wanted.items():
        if key in found and isinstance(value, dict) and isinstance(found[key], dict):
            yield from _differences(value, found[key], f"{within}{key}.")
        elif key not in found or value != found[key]:
            yield f"{'' if key in found else '+'}{within}{key}={as_override(value)}"


def as_override(value: Any) -> str:
    """A config value as Hydra's command line takes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_override(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_override, value)) + "]"
    if isinstance(value, str):
        plain = value.isidentifier() and value.lower() not in ("null", "true", "false", "nan", "inf")
        return value if plain else repr(value)
    return as_yaml(value)
