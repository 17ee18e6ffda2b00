"""From what was typed to what is printed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path

from morphtrain import schema
from morphtrain.compare import report
from morphtrain.compare.measure import measure
from morphtrain.errors import UserError
from morphtrain.schema import Config

# What a run does with these, a comparison does not.
UNUSED = (
    *("tracking", "resume", "resume_schedule", "trial", "objective", "hydra", "timing.reference"),
    *("processes", "process_timeout", "timing.profile"),
)
SHARED = ("device", "timing.cores", "timing.when_busy")  # of the process, so of both sides
FORMS = "A.. -- B.., COMMON.. -- A.. -- B.., or A.. --vs FILE.py"


def show(options: argparse.Namespace, parts: Sequence[list[str]]) -> None:
    """Measure, print what it gave, and write it to `options.json` if that is set.

    Raises:
        UserError: for a mistake that the user can fix.
        OSError: if the file cannot be written.
        Interrupted: after a signal.
    """
    sides = sides_of(options, parts)
    _check(options, sides)
    named = {seed: _configs(sides, seed, options) for seed in options.seeds or (None,)}
    measured = {seed: measure(configs, options.vs, options.steps) for seed, configs in named.items()}
    words = _in_words(options, parts)
    report.show(words, measured)
    if options.json is not None:
        composed = {seed: [asdict(config) for config in configs] for seed, configs in named.items()}
        report.write(options.json, words, composed, measured)


def sides_of(options: argparse.Namespace, parts: Sequence[list[str]]) -> dict[str, list[str]]:
    """The overrides of A, and of B if that is a config; raises a `UserError` for another number of parts."""
    if options.vs is not None and len(parts) == 1:
        return {"A": parts[0]}
    if options.vs is None and len(parts) in (2, 3):
        *common, a, b = parts
        shared = common[0] if common else []
        return {"A": [*shared, *a], "B": [*shared, *b]}
    raise UserError(f"{len(parts)} config{'s' * (len(parts) != 1)} with -- between them; {FORMS} works")


def _in_words(options: argparse.Namespace, parts: Sequence[list[str]]) -> dict[str, str]:
    """What was typed for A, for B, and for both."""
    typed = [" ".join(part) or "the defaults" for part in parts]
    if options.vs is not None:
        typed.append(options.vs)
    return dict(zip(("both", "A", "B")[-len(typed) :], typed, strict=True))


def _check(options: argparse.Namespace, sides: Mapping[str, list[str]]) -> None:
    """Raise a `UserError` for what would be ignored, or fail only at the end."""
    schema.check(options.steps is None or options.steps >= 1, "--steps", options.steps, "1 or more")
    typed = check_effect("a comparison", [override for overrides in sides.values() for override in overrides])
    if options.seeds:
        seeds = ",".join(map(str, options.seeds))
        if options.vs is not None or "seed" in typed:
            raise UserError(f"--seeds {seeds}: works without --vs, whose code takes no seed, and without another seed=")
        schema.check(len(set(options.seeds)) == len(options.seeds), "--seeds", seeds, "different numbers")
    path: Path | None = options.json
    if path is not None:
        schema.check(path.parent.is_dir() and not path.is_dir(), "--json", path, "a file in a directory that exists")


def check_effect(what: str, overrides: Sequence[str], besides: Sequence[str] = ()) -> list[str]:
    """The keys of overrides; raises a `UserError` for one of what only `morphtrain.run` does, and `what` does not.

    Args:
        besides: keys that have no effect on this.
    """
    typed = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for key in typed:
        if any(key == unused or key.startswith(f"{unused}.") for unused in (*UNUSED, *besides)):
            raise UserError(f"{key}: has no effect on {what}; leave it out")
    return typed


def _configs(sides: Mapping[str, list[str]], seed: int | None, options: argparse.Namespace) -> list[Config]:
    """The config of each side, which have to agree on what is the process's."""
    seeded = [] if seed is None else [f"seed={seed}"]
    configs = [schema.compose(*overrides, *seeded, config_dir=options.config_dir) for overrides in sides.values()]
    for key in SHARED:
        values = {"null" if (value := attrgetter(key)(config)) is None else str(value) for config in configs}
        if len(values) > 1:
            raise UserError(f"{key}: {' and '.join(sorted(values))}; both sides run in one process, so it is the same")
    return configs
