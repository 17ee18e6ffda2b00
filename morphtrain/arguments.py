"""A command line before Hydra reads it: flags that do not exist, passwords, and presets that need several jobs."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import fields

from hydra._internal.utils import get_args_parser

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.flags import end, no_such_flag
from morphtrain.processes.place import place
from morphtrain.schema.names import keys_of_file

# What says how a multirun searches and where its jobs run; in a single run it would do nothing.
OF_A_MULTIRUN = ("sweep", "experiment", "launcher", "hydra/sweeper", "hydra/launcher")
MULTIRUN = "hydra.mode=MULTIRUN"
ONLY_SHOW = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")


def prepared(arguments: Sequence[str]) -> list[str]:
    """The arguments for a Hydra command, which becomes a multirun if a preset for one was typed.

    Raises:
        UserError: for a flag that Hydra does not have; for a multirun in one of several processes; for a password,
            before Hydra writes the overrides to files; for a key that some options of a grid lack, of which with `++`
            only their own jobs would complain; for a size of no experiment, which would do nothing; for steps to
            profile in a multirun.
    """
    flags = check_flags(arguments)
    _check_shown(flags)
    typed = [argument.lstrip("+").partition("=") for argument in arguments]
    for key, _, value in typed:
        if key.startswith("tracking"):
            schema.tracking.check_address(value)
        if key.startswith("hydra.sweeper"):
            schema.sweeper.check_storage(value)
        if key == "size" and all(other != "experiment" for other, _, _ in typed):
            raise UserError(f"size={value}: is that of an experiment, as +experiment=recipe size={value}")
    arguments = _seeds_outermost(_in_a_grid(arguments))
    keys = {key for key, _, _ in typed}
    becomes_one = not keys.isdisjoint(OF_A_MULTIRUN) and "hydra.mode" not in keys
    if (becomes_one or flags.multirun or MULTIRUN in arguments) and not only_show(arguments):
        _check_alone("-m" if flags.multirun else min(keys & {*OF_A_MULTIRUN, "hydra.mode"}))
        for key, _, value in typed:
            if key == "timing.profile" and value != "null":
                raise UserError(f"{key}={value}: must be null in a multirun: it compares times; profile one run")
    return [*arguments, MULTIRUN] if becomes_one else list(arguments)


def only_show(arguments: Sequence[str]) -> bool:
    """Whether nothing is to run: a flag asks for help, or for what would run."""
    return any(argument.partition("=")[0] in ONLY_SHOW for argument in arguments)


def _check_alone(typed: str) -> None:
    """Raise a `UserError` if this process, which is to start runs because of what was typed, is one of several."""
    if (here := place()) is not None:
        started = f"a multirun is one process, and {here.by} has started {here.size}"
        raise UserError(f"{typed}: {started}; without {here.by}, processes={here.size} gives each run as many")


def _in_a_grid(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `++` before the keys of a group of which they choose several options.

    Hydra composes the config with the group's default once, which may lack the key, before it composes the jobs.

    Raises:
        UserError: for a key that one of the options has, but another lacks.
    """
    found = dict(argument.partition("=")[::2] for argument in arguments)
    chosen = {group: _values(found[group]) for group in schema.OPTIONS if group in found}
    chosen = {group: options for group, options in chosen.items() if len(options) > 1}
    return [_of_several(argument, chosen) for argument in arguments]


def _values(text: str) -> list[str]:
    return [value.strip() for value in text.removeprefix("choice(").removesuffix(")").split(",")]


def _of_several(argument: str, chosen: Mapping[str, Sequence[str]]) -> str:
    key = argument.partition("=")[0].lstrip("+")
    group, _, name = key.partition(".")
    keys = {option: keys_of_file(group, option) for option in chosen.get(group, ()) if name}
    has = {option: name.partition(".")[0] in names for option, names in keys.items() if names is not None}
    lacking = [f"{group}={option}" for option, found in has.items() if not found]
    if lacking and any(has.values()):
        without = " and ".join(lacking)
        raise UserError(
            f"{argument}: all jobs of a grid get the same keys, and {without} has none of that name; give it "
            "a command of its own"
        )
    return f"++{argument}" if keys and len(has) == len(keys) and argument.startswith(key) and not lacking else argument


def _seeds_outermost(arguments: Sequence[str]) -> list[str]:
    """The arguments with several seeds before all other keys.

    Hydra's grid varies the first slowest, so all configurations of a seed run side by side, whichever way they are
    typed; and a further seed at the end leaves the numbers of the jobs before it as they are.
    """
    several = [argument for argument in arguments if argument.startswith("seed=") and _is_sweep(argument)]
    if len(several) != 1:
        return list(arguments)
    others = [argument for argument in arguments if argument not in several]
    first = next((i for i, argument in enumerate(others) if "=" in argument and argument[0] != "-"), len(others))
    return [*others[:first], *several, *others[first:]]


def _is_sweep(argument: str) -> bool:
    value = argument.partition("=")[2]
    return "," in value or value.startswith(("range(", "choice("))


def _check_shown(flags: argparse.Namespace) -> None:
    """Raise a `UserError` where `--cfg` could not show what would run."""
    if not flags.cfg:
        return
    if flags.multirun:
        raise UserError(
            f"--multirun --cfg {flags.cfg}: a config is shown of one run; leave out -m and give each key one value"
        )
    experiment = next((override for override in flags.overrides if override.startswith("+experiment=")), None)
    if experiment and flags.cfg != "hydra":
        raise UserError(
            f"{experiment} --cfg {flags.cfg}: an experiment has a config for each arm; "
            "--cfg hydra --package hydra.sweeper shows its declaration"
        )


def check_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags as typed; raises a `UserError` for what begins with a dash and is none of them: often a key."""
    parser = get_args_parser()
    vars(parser)["error"] = functools.partial(end, parser)
    flags, unknown = parser.parse_known_intermixed_args(arguments)
    keys = {field.name for kind in (schema.Config, schema.MaxBatch) for field in fields(kind)}
    for flag in (argument for argument in unknown if argument.startswith("-")):
        key, equals, value = flag.lstrip("-").partition("=")
        key = key.replace("-", "_")
        if equals or "." in key or key in keys:
            raise UserError(f"{flag}: no such flag; keys are typed without dashes, as {key}={value or '...'}")
        raise UserError(no_such_flag(flag, parser._option_string_actions))
    return flags
