"""What the last word of a command line may become: commands, options of groups, keys, flags. Without torch."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from morphtrain import __main__ as program
from morphtrain.completion import SHELLS
from morphtrain.wording import AS_A_MODULE

CONFIGS = {"run": "config", "sweep": "config", "compare": "config", "lr_finder": "config", "maxbatch": "maxbatch"}
FLAGS_OF_HYDRA = ("run", "sweep", "maxbatch")
FIRST = {"completion": SHELLS, "evidence": ("table", "test", "fit")}  # what a command's first word may be
ADDED = ("sweep", "experiment", "launcher")  # groups that the config has no option of: +sweep=prunetrain
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def candidates(words: Sequence[str]) -> list[str]:
    """What the last of `words` may become; empty where only a file can be meant, or nothing is known.

    Args:
        words: a command line up to the cursor, with its program; the last word may be empty.
    """
    first, *rest = words or [""]
    if Path(first).name != "morphtrain":
        if len(rest) < 2 or rest[0] != "-m":
            return []
        module = rest[1]
        rest = rest[2:] if module == "morphtrain" else [module.removeprefix("morphtrain."), *rest[2:]]
        if len(words) == 3:
            modules = (f"morphtrain.{name}" for name in program.COMMANDS if name != "sweep")
            return _fitting(module, ["morphtrain", *modules])
    if len(rest) < 2:
        return _fitting("".join(rest), [*program.COMMANDS, "--help", "--version"])
    name, *before, current = rest
    return _fitting(current, _of_command(name, before, current))


def _fitting(current: str, found: Sequence[str]) -> list[str]:
    """Those that begin as typed and are one line of plain text, each once and in order."""
    return sorted({one for one in found if one.startswith(current) and one.isprintable()})


def _of_command(name: str, before: Sequence[str], current: str) -> list[str]:
    known = _flags(name, before)
    flag = before[-1] if before else ""
    if flag in known and known[flag] is not None:
        return known[flag] or []
    if current.startswith("-"):
        return list(known)
    found = list(FIRST.get(name, ())) if not before else []
    if name not in CONFIGS:
        return found
    if name == "sweep" and not before:
        found += [option.partition("=")[2] for option in _overrides("config", [], "+sweep=")]
    elif name == "sweep" and "=" not in before[0]:
        before = [f"+sweep={before[0]}", *before[1:]]
    return found + _overrides(CONFIGS[name], before, current)


def _flags(name: str, before: Sequence[str]) -> dict[str, list[str] | None]:
    """Flags of a command, each with what may follow it: choices, none that are known (empty), or no value (None)."""
    if name in FLAGS_OF_HYDRA:
        from hydra._internal.utils import get_args_parser

        actions = get_args_parser()._option_string_actions
        return {flag: None if a.nargs == 0 else list(a.choices or ()) for flag, a in actions.items()}
    named = FLAG.findall(_help(name, before[:1] if name in FIRST else ()))
    return {flag: None if flag == "--help" else [] for flag in named}


def _help(name: str, words: Sequence[str]) -> str:
    """What a command answers to --help; "" for an unknown one."""
    if name not in program.COMMANDS:
        return ""
    text, sys.argv = io.StringIO(), ["morphtrain", name, *words, "--help"]
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        program.main(AS_A_MODULE)  # which imports nothing of the current directory
    return text.getvalue()


def _overrides(config: str, before: Sequence[str], current: str) -> list[str]:
    """Groups, their options and keys, as Hydra finds them for the config that the words before compose."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    from morphtrain.schema import CONF, OPTIONS

    key, _, value = current.partition("=")
    done, comma, last = value.rpartition(",")
    if comma and key in OPTIONS:  # one of several options
        ends = (found.partition("=")[2] for found in _overrides(config, before, f"{key}={last}"))
        return [f"{key}={done},{end}" for end in ends]
    composed = [*_own_options(before), *(word for word in _last_part(before) if _is_override(word))]
    with initialize_config_dir(str(CONF)):
        hydras = DefaultCompletionPlugin(GlobalHydra.instance().config_loader())
        found = hydras._query(config, " ".join([*composed, current]))
    return list(_usable(found, config, composed))


def _usable(found: Sequence[str], config: str, composed: Sequence[str]) -> Iterator[str]:
    """What Hydra finds, as it is typed: lists as a whole, some groups with a plus, and no group that is not used."""
    from morphtrain.schema import OPTIONS, MaxBatch

    useless = set(OPTIONS) - {field.name for field in fields(MaxBatch)} if config == "maxbatch" else set()
    for one in found:
        key, equals, value = one.partition("=")
        if equals and value.endswith((".", "=")):
            continue  # a key within a value
        if key.lstrip("+") in useless:
            continue
        if key in ADDED:
            yield f"+{one}"
        elif not equals and key.endswith(".") and _is_list(key[:-1]):
            yield f"{key[:-1]}="
        elif key != "size" or any(word.startswith("+experiment=") for word in composed):
            yield one


def _is_list(key: str) -> bool:
    """Whether a key takes a list in any option that has it."""
    from morphtrain import schema

    group, _, name = key.partition(".")
    kinds = schema.OPTIONS[group].values() if name and group in schema.OPTIONS else (schema.Config, schema.MaxBatch)
    key = name or group
    return any(
        "list" in str(get_type_hints(kind).get(key))
        or any(field.name == key and field.default_factory is list for field in fields(kind))
        for kind in kinds
    )


def _is_override(word: str) -> bool:
    """Whether Hydra would take a word, which holds no space, for an override."""
    return not word.startswith("-") and ("=" in word or word.startswith("~")) and not re.search(r"\s", word)


def _last_part(words: Sequence[str]) -> Sequence[str]:
    """The words of the config that is being typed: `compare` has `--` between its configs."""
    ends = [place for place, word in enumerate(words) if word == "--"]
    return words[ends[-1] + 1 :] if ends else words


def _own_options(words: Sequence[str]) -> list[str]:
    """The override by which Hydra finds option files of the user's own, where --config-dir names them."""
    flags = ("--config-dir", "-cd")
    given = [word for flag, word in itertools.pairwise(words) if flag in flags]
    given += [word.partition("=")[2] for word in words if word.startswith("--config-dir=")]
    return [f"hydra.searchpath=[file://{Path(one).absolute()}]" for one in given if re.fullmatch(r"[\w./-]+", one)]
