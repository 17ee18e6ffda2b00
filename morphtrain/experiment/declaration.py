"""From an experiment's file and what was typed beside it to its declaration, which has no more to be worked out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.evidence.experiment import Arm, Experiment
from morphtrain.schema.experiment import ArmKeys, ExperimentKeys, SizeKeys

ASIDE = ("experiment", "size", "launcher", "tracking", "data.root", "data.download")  # change nothing that is computed
OWN = ("resume", "trial", "architecture", "chosen")  # keys that an experiment sets by itself
SHAPING = (
    "prune",
    "grow",
    "methods",
    "epochs",
)  # what a network trained from scratch does not take from the arm that shaped it

Compose = Callable[[Sequence[str]], DictConfig]


@dataclass(frozen=True)
class Typed:
    """What was typed beside the experiment's name.

    Args:
        overrides: those of all arms, which belong to the declaration.
        aside: those of all runs that do not: where they run, and where records go.
        seeds: instead of the file's; None: the file's.
    """

    overrides: tuple[str, ...]
    aside: tuple[str, ...]
    seeds: tuple[int, ...] | None


def typed(arguments: Sequence[str]) -> Typed:
    """Sort the overrides of the command line.

    Raises:
        UserError: for a key that an experiment sets by itself, or several values of any but the seed.
    """
    overrides: list[str] = []
    aside: list[str] = []
    seeds = None
    for argument, parsed in zip(arguments, OverridesParser.create().parse_overrides(list(arguments)), strict=True):
        key = key_of(argument)
        if key == "seed":
            values = parsed.sweep_iterator() if parsed.is_sweep_override() else [parsed.value()]
            seeds = tuple(map(_seed, values))
        elif key in OWN:
            raise UserError(f"{argument}: an experiment sets {key} by itself")
        elif parsed.is_sweep_override():
            raise UserError(
                f"{argument}: an experiment has its arms in its file, and one value here; seed takes several"
            )
        else:
            (aside if is_of(key, ASIDE) else overrides).append(argument)
    return Typed(tuple(overrides), tuple(aside), seeds)


def _seed(value: Any) -> int:
    number = int(value) if str(value).isdecimal() else -1
    schema.check(0 <= number < 2**32, "seed", value, "0 to 4294967295, or several of them: seed=1,2,3")
    return number


def declared(name: str, keys: Mapping[str, Any], arguments: Typed, compose: Compose) -> Experiment:
    """The declaration of an experiment.

    Args:
        name: of its file.
        keys: the config node `hydra.sweeper`.
        compose: makes the config of a run from its overrides.

    Raises:
        UserError: naming the key, if there is no such size, a typed key is one that arms differ in, an arm cannot be
            run, or two arms are the same.
    """
    facts = schema.typed(ExperimentKeys, keys, "hydra.sweeper")
    schema.check_one_of("size", facts.size, tuple(facts.sizes))
    size = _sizes(facts.sizes)[facts.size]
    common = merged(size.overrides, arguments.overrides)
    arms = _arms(facts.arms, facts.size)
    _check_free(arguments.overrides, arms)

    @functools.cache  # a composition takes a tenth of a second, and arms with shares have the same one
    def whole(overrides: tuple[str, ...]) -> DictConfig:
        return compose(merged(common, arguments.aside, overrides))

    resolved: dict[str, Arm] = {}
    configs: dict[str, DictConfig] = {}
    for arm, keys_of_arm in arms.items():
        with _naming(arm):
            overrides = _overrides(keys_of_arm, arms, whole)
            resolved[arm] = Arm(overrides, keys_of_arm.role, keys_of_arm.of)
            configs[arm] = whole(overrides)
    own = {key: value for key, value in asdict(facts).items() if key not in ("arms", "sizes", "attempts")}
    seeds = arguments.seeds or tuple(size.seeds)
    _check_seeds(seeds, "seed" if arguments.seeds else f"hydra.sweeper.sizes.{facts.size}.seeds")
    try:
        experiment = Experiment(name=name, arms=resolved, seeds=seeds, overrides=tuple(common), **own)
    except UserError as error:  # names the key as it is in experiment.yaml
        raise UserError(f"hydra.sweeper.{error}") from error
    _check_runs(experiment, configs)
    return experiment


def merged(*lists: Sequence[str]) -> list[str]:
    """Overrides of which the last of a key counts, as one list."""
    last = {key_of(override): override for overrides in lists for override in overrides}
    return list(last.values())


def key_of(override: str) -> str:
    """The key or group of an override."""
    return override.split("=", 1)[0].lstrip("+~")


def _check_seeds(seeds: Sequence[int], key: str) -> None:
    right = len(set(seeds)) == len(seeds) > 0 and all(0 <= seed < 2**32 for seed in seeds)
    schema.check(right, key, list(seeds), "one or more different seeds, each 0 to 4294967295")


def _sizes(nodes: Mapping[str, Any]) -> dict[str, SizeKeys]:
    default: dict[str, list[str]] = {"overrides": []}
    return {name: _filled(SizeKeys, default, node, f"hydra.sweeper.sizes.{name}") for name, node in nodes.items()}


def _filled(kind: type, defaults: Mapping[str, Any], node: Any, at: str) -> Any:
    """An instance of dataclass `kind` from a node of the file, with the defaults of what that leaves out."""
    schema.check(isinstance(node, Mapping), at, node, "keys with values, as {overrides: [epochs=6]}")
    return schema.typed(kind, {**defaults, **node}, at)


def _arms(nodes: Mapping[str, Any], size: str) -> dict[str, ArmKeys]:
    """The arms, with the overrides of this size among those of all sizes."""
    arms = {}
    for name, node in nodes.items():
        at = f"hydra.sweeper.arms.{name}"
        arm = _filled(ArmKeys, asdict(ArmKeys()), {} if node is None else node, at)
        for key in ("epochs", "width"):
            share = getattr(arm, key)
            schema.check(share is None or share > 0, f"{at}.{key}", share, "above 0, a share of what it would be")
        of_size = {"small": arm.small, "medium": arm.medium, "full": arm.full, "thesis": arm.thesis}
        arm.overrides = merged(arm.overrides, of_size.get(size, []))
        arms[str(name)] = arm
    return {name: _with_parts(name, arm, arms) for name, arm in arms.items()}


def _with_parts(name: str, arm: ArmKeys, arms: Mapping[str, ArmKeys]) -> ArmKeys:
    """An arm with the overrides of the arms that it puts together; its own win."""
    whole = [other for other, keys in arms.items() if not (keys.parts or keys.epochs or keys.width)]
    for part in arm.parts:
        wanted = f"one of {', '.join(whole)}: an arm without parts and shares"
        schema.check(part in whole, f"hydra.sweeper.arms.{name}.parts", part, wanted)
    return replace(arm, overrides=merged(*(arms[part].overrides for part in arm.parts), arm.overrides))


def _check_free(overrides: Sequence[str], arms: Mapping[str, ArmKeys]) -> None:
    """Raise a `UserError` for a typed key that arms have values of their own of, which would win."""
    for override in overrides:
        for name, arm in arms.items():
            if key_of(override) in map(key_of, arm.overrides):
                raise UserError(f"{override}: arm {name} of the experiment has a value of its own; take another key")


def _overrides(
    arm: ArmKeys, arms: Mapping[str, ArmKeys], whole: Callable[[tuple[str, ...]], DictConfig]
) -> tuple[str, ...]:
    """An arm's overrides, with those of the arm that shaped its network, and with shares worked out."""
    shaped_by = arms[arm.of].overrides if arm.of is not None and arm.of in arms else []
    overrides = merged([other for other in shaped_by if not is_of(key_of(other), SHAPING)], arm.overrides)
    plain = tuple(overrides)
    overrides += shared(arm.epochs, arm.width, lambda: whole(plain))
    return tuple(overrides)


def shared(epochs: float | None, width: float | None, config: Callable[[], DictConfig]) -> list[str]:
    """The overrides by which a run takes shares of the epochs and of the width that a config has; None takes all."""
    overrides = []
    for key, share in {"epochs": epochs, "model.width": width}.items():
        if share is not None:
            full = OmegaConf.select(config(), key)
            schema.check(type(full) is int, key, full, f"a whole number, of which an arm takes {share:g}")
            overrides.append(f"{key}={max(1, round(share * full))}")
    return overrides


@contextlib.contextmanager
def _naming(arm: str) -> Iterator[None]:
    """Say of which arm a mistake is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"arm {arm}: {error}") from error


def is_of(key: str, keys: Sequence[str]) -> bool:
    """Whether it is one of the keys, or below one."""
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def _check_runs(experiment: Experiment, configs: Mapping[str, DictConfig]) -> None:
    """Raise a `UserError` for an arm that cannot run, is the same as another, or does not record what decides."""
    plain = {}
    for name, config in configs.items():
        with _naming(name):
            parsed = schema.parse(config)
        known = (*parsed.recorded, *schema.TESTED)
        for key in ("response", "y"):
            metric = getattr(experiment, key)
            if metric is not None and not parsed.records_more:
                schema.check_one_of(f"hydra.sweeper.{key}", metric, known)
        if experiment.x is not None and experiment.x not in known:
            value = OmegaConf.select(config, experiment.x) if experiment.x else None  # "" selects everything
            schema.check(value is not None, "hydra.sweeper.x", experiment.x, f"a metric, or a key that arm {name} has")
        plain[name] = (OmegaConf.to_container(config, resolve=True), experiment.arms[name].of)
    names = list(plain)
    for index, name in enumerate(names):
        for other in names[:index]:
            if plain[name] == plain[other]:
                raise UserError(f"hydra.sweeper.arms.{name}: is the same run as {other}; give it overrides of its own")
