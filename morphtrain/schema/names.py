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

OF_TEMPLATES = {  # what other templates call it: what it is called here
    "trainer": "processes or device",
    "trainer.devices": "processes",
    "trainer.accelerator": "device",
    "trainer.gradient_clip_val": "clip_norm",
    "logger": "tracking",
    "callbacks": "methods",
    "ckpt_path": "resume or model.weights",
    "hparams_search": "+sweep",
}
FORMATS = {  # likewise, options of precision
    **dict.fromkeys(("fp16", "16", "16-mixed", "float16", "half", "amp"), "o1"),
    **dict.fromkeys(("bf16-mixed", "bfloat16"), "bf16"),
    **dict.fromkeys(("fp32", "32", "float32"), "o0"),
}
TORCHVISION = "; model=torchvision model.name={} takes torchvision's networks, model=custom your own"


def no_such_option(group: str, name: str, options: Sequence[str]) -> str:
    """The message for `group=name`, where the group has `options`."""
    more = TORCHVISION.format(name or "...") if group == "model" else ""
    theirs = FORMATS.get(name) if group == "precision" else None
    hint = f"did you mean {theirs}?" if theirs else nearest(name, options)
    known = f"; {hint}".rstrip("?" if more else "") if options else ""
    return f"{group}={name}: no such option{known}{more}"


def no_such_key(key: str, value: str) -> str:
    """The message for `key=value`, where the config has no such key."""
    group, _, name = key.partition(".")
    if group == "hydra":
        return f"{key}={value}: no such key{_hydras(name)}"
    if group not in OPTIONS:
        return f"{key}={value}: no such key{_near_the_top(key)}"
    has = {option: keys(group, option) for option in OPTIONS[group]}
    owners = [option for option, names in has.items() if name in names]
    others = _ending_in(key)
    close = difflib.get_close_matches(name, sorted({n for names in has.values() for n in names}), n=3)
    added = f"a keyword of a part of your own is added by +{key}={value}"
    if len(owners) == len(has):
        hint = f"an option file of your own may leave it out; +{key}={value} adds it"
    elif owners:
        hint = f"add {' or '.join(f'{group}={option}' for option in owners)}"
    elif others:
        hint = f"did you mean {' or '.join(others)}? {added[0].upper()}{added[1:]}"
    elif close:
        hint = f"did you mean {' or '.join(f'{group}.{n}' for n in close)}?"
    else:
        hint = f"--help shows its keys; {added}"
    return f"{key}={value}: the chosen option of {group} has no such key; {hint}"


def _near_the_top(key: str) -> str:
    """A hint for a key that is in no group; "" below a key that has none below it."""
    top = _top()
    group, _, name = key.partition(".")
    if group in top:
        return ""
    last = name.rpartition(".")[2]
    if theirs := OF_TEMPLATES.get(key) or ("" if group == "trainer" and name else OF_TEMPLATES.get(group)):
        return f"; did you mean {theirs}?"
    if found := _ending_in(key) or difflib.get_close_matches(last, top, n=1, cutoff=0.7):
        return f"; did you mean {' or '.join(found)}?"
    return f"; {nearest(group, top)}"


def _ending_in(key: str) -> list[str]:
    """The keys whose last part is that of `key`: one without a group, or else those of groups."""
    last = key.rpartition(".")[2]
    if last in _top():
        return [last]
    return [f"{group}.{last}" for group in OPTIONS if any(last in keys(group, option) for option in OPTIONS[group])]


def _top() -> list[str]:
    from morphtrain.schema.config import Config

    return [*(field.name for field in fields(Config)), "hydra"]


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
