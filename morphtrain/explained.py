"""What `--help` shows: the config as it would be run, each key with the comment that explains it in `conf/`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from morphtrain.schema.files import CONF

KEY = re.compile(r"(?P<key>\w+):(?P<space> *)(?P<value>.*?)(?P<comment> *#.*)?")
BASE = re.compile(r"defaults: \[(?P<base>\w+), _self_\]")


def config(*, _root_: DictConfig) -> str:
    """A resolver of OmegaConf's: the config that it is used in, explained, for `hydra.help.template`."""
    name = _root_.hydra.job.config_name
    choices = _root_.hydra.runtime.choices
    parts = ["\n".join(_lines(CONF / f"{name}.yaml", _root_))]
    for group in (str(key) for key in _root_ if key in choices):
        option = choices[group]
        path = CONF / group / f"{option}.yaml"
        if path.is_file():  # not one of the user's own
            others = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
            lines = [f"{group}={option}   (there are {others})", *(f"  {li}" for li in _lines(path, _root_[group]))]
            parts.append("\n".join(lines))
    return "\n\n".join(parts).replace("$", "$$")  # Hydra puts it into a template


def _lines(path: Path, node: Any) -> Iterator[str]:
    """A file's lines with the values of `node`, without its defaults and what it says to Hydra."""
    seen: set[str] = set()
    lines = path.read_text().split("\nhydra:")[0].splitlines()
    for line in lines:
        if based := BASE.fullmatch(line):
            base = list(_lines(path.with_name(f"{based['base']}.yaml"), node))
            seen = {found["key"] for li in base if (found := KEY.fullmatch(li))}
            yield from base[1:]
        elif found := KEY.fullmatch(line):
            says_no_more = found["key"] == "defaults" or (found["key"] == "name" and not found["comment"])
            if found["key"] not in seen and not says_no_more:
                yield _with_value(line, found, node)
        elif not line.startswith("  - "):  # of the defaults
            yield line


def _with_value(line: str, found: re.Match[str], node: Any) -> str:
    """The line with the value that its key has in `node`."""
    key = found["key"]
    if key not in set(node) or OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
        return line
    value = node[key]
    default = OmegaConf.create(f"x: {found['value']}")
    if not OmegaConf.is_missing(default, "x") and default.x == value:
        return line
    shown = OmegaConf.to_container(value) if isinstance(value, (DictConfig, ListConfig)) else value
    text = shown if isinstance(shown, str) else json.dumps(shown)
    return f"{key}:{found['space']}{text}{found['comment'] or ''}"
