"""Names that do not exist: the nearest that do, and where a key belongs that another option of its group has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf

from morphtrain.schema.custom import Custom
from morphtrain.schema.files import CONF
from morphtrain.schema.option import OPTIONS, option_of
from morphtrain.wording import nearest

TORCHVISION = "; model=torchvision model.name={} takes torchvision's networks, model=custom your own"


def no_such_option(group: str, name: str, options: Sequence[str]) -> str:
    """The message for `group=name`, where the group has `options`."""
    more = TORCHVISION.format(name or "...") if group == "model" else ""
    known = f"; {nearest(name, options)}".rstrip("?" if more else "") if options else ""
    return f"{group}={name}: no such option{known}{more}"


def no_such_key(key: str, value: str) -> str:
    """The message for `key=value`, where the config has no such key."""
    from morphtrain.schema.config import Config

    group, _, name = key.partition(".")
    if group == "hydra":
        return f"{key}={value}: no such key{_hydras(name)}"
    if group not in OPTIONS:
        top = [*(field.name for field in fields(Config)), "hydra"]
        inside = [f"{part}.{key}" for part in OPTIONS if any(key in keys(part, option) for option in OPTIONS[part])]
        known = f"; did you mean {' or '.join(inside)}?" if inside else f"; {nearest(group, top)}"
        known = known if group not in top else ""
        return f"{key}={value}: no such key{known}"
    has = {option: keys(group, option) for option in OPTIONS[group]}
    owners = [option for option, names in has.items() if name in names]
    close = difflib.get_close_matches(name, sorted({n for names in has.values() for n in names}), n=3)
    if len(owners) == len(has):
        hint = f"an option file of your own may leave it out; +{key}={value} adds it"
    elif owners:
        hint = f"add {' or '.join(f'{group}={option}' for option in owners)}"
    elif close:
        hint = f"did you mean {' or '.join(f'{group}.{n}' for n in close)}?"
    else:
        hint = f"--help shows its keys; a keyword of a part of your own is added by +{key}={value}"
    return f"{key}={value}: the chosen option of {group} has no such key; {hint}"


def keys_of_file(group: str, option: str) -> list[str] | None:
    """The keys of an option by the name of its file; None for a file or a part of the user's own."""
    path = CONF / group / f"{option}.yaml"
    if not path.is_file() or option == "custom":
        return None
    stored: Any = OmegaConf.load(path)
    name = option_of(stored)
    return keys(group, name) if name is not None else keys_of_file(group, stored.defaults[0])


def keys(group: str, option: str) -> list[str]:
    """The keys of an option."""
    kind = OPTIONS[group][option]
    return [field.name for field in fields(kind) if field.name != ("arguments" if issubclass(kind, Custom) else "name")]


def _hydras(key: str) -> str:
    """A hint for a key of Hydra's, which is given without its `hydra.`; "" if no key is close."""
    from hydra.conf import HydraConf

    section, _, name = key.partition(".")
    known: Iterable[Any] = []
    if section == "sweeper":
        ours: Any = OmegaConf.load(CONF / "hydra/sweeper/morphtrain.yaml")
        known = {"sampler", "pruner", *ours} - {"defaults", "_target_"}
        if name in known:
            return "; add hydra/sweeper=morphtrain, or a preset with +sweep="
    elif section == "launcher":
        presets = {path.stem: OmegaConf.load(path) for path in (CONF / "launcher").glob("*.yaml")}
        owned = {preset: OmegaConf.select(config, "hydra.launcher") or () for preset, config in presets.items()}
        if owners := [preset for preset, names in owned.items() if name in names]:
            return f"; add {' or '.join(f'+launcher={owner}' for owner in sorted(owners))}"
        known = {name for names in owned.values() for name in names}
    else:
        node = OmegaConf.structured(HydraConf)
        while name and section in node and OmegaConf.is_dict(node[section]):
            node, (section, _, name) = node[section], name.partition(".")
        known, name = node, section
    close = difflib.get_close_matches(name, map(str, known), n=3)
    above = f"hydra.{key[: f'.{key}.'.index(f'.{name}.')]}"
    return f"; did you mean {' or '.join(f'{above}{n}' for n in close)}?" if close else ""
