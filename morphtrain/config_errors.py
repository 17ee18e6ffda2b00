"""Hydra's and OmegaConf's errors about a config, each as one line: key, value, and what would work.

Their own messages have up to a dozen lines: search paths, the grammar of overrides, types of the libraries' own.
"""

from __future__ import annotations

import re
import sys

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from morphtrain.errors import first_line
from morphtrain.schema.names import no_such_key, no_such_option
from morphtrain.schema.option import OPTIONS

UNKNOWN_KEY = re.compile(r"Could not override '(?P<key>[^']*)'\.\nTo append to your config use \+[^=]*=(?P<value>.*)")
UNKNOWN_GROUP = re.compile(r"Could not override '(?P<key>[^']*)'\.\n")
WITHOUT_PLUS = re.compile(r"Could not override '[^']*'\.\s+No match in .*list use (?P<override>\+\S+)", re.DOTALL)
WRONG_KIND = re.compile(r"Error merging override (?P<override>.*)")
SEVERAL = re.compile(r"Ambiguous value for argument '(?P<key>[^=]*)=(?P<values>[^']*)'")
NO_QUESTION = "; an experiment's file declares one, and its first line is `# @package _global_`"
NO_OPTION = re.compile(r"Config group override must be a string or a list. Got \w+")


def one_line(error: Exception) -> str | None:
    """The message for an error of Hydra's or OmegaConf's; None for any other error."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return no_such_option(group, name, error.options or ())
    if isinstance(error, OverrideParseException):
        reasons = [line for line in error.message.splitlines() if not line.startswith(("Error ", "See "))]
        said = f" ({reasons[0]})" if reasons else ""
        return f"{error.override}: cannot be read{said}; key=value works, with quotes around other characters"
    if isinstance(error, HydraException):
        return _composition(error)
    if isinstance(error, OmegaConfBaseException):
        said = first_line(error)
        hint = NO_QUESTION if error.full_key == "hydra.sweeper.question" else ""
        return f"{error.full_key}: {said[0].lower()}{said[1:]}{hint}" if error.full_key else said
    if isinstance(error, ValueError) and NO_OPTION.match(str(error)):
        return _no_name()
    return None


def _no_name() -> str:
    """For `prune=null` and `prune=3`, which Hydra's error does not name."""
    for group, _, value in (argument.partition("=") for argument in sys.argv[1:]):
        if group in OPTIONS and not re.match(r"(?!null)[a-zA-Z_]", value):
            return no_such_option(group, value, list(OPTIONS[group]))
    return "a group: null or a number; the name of an option works"


def _composition(error: HydraException) -> str:
    text = str(error)
    if found := UNKNOWN_KEY.match(text):
        return no_such_key(found["key"], found["value"])
    if found := WITHOUT_PLUS.match(text):
        return f"{found['override'][1:]}: no run has this group by itself; {found['override']} adds it"
    if found := UNKNOWN_GROUP.match(text):
        return f"{found['key']}: no such group"
    if found := WRONG_KIND.match(text):
        return f"{found['override']}: must be of the kind that it replaces: a value, a list in [], or {{key: value}}"
    if found := SEVERAL.match(text):
        key, values = found["key"], found["values"]
        return f"{key}={values}: several values need -m, which runs one job for each; a list is {key}=[{values}]"
    said = " ".join(text.split())
    return f"{said}: {first_line(error.__cause__)}" if isinstance(error.__cause__, OmegaConfBaseException) else said
