"""Every command that the documentation shows can be typed: its options, groups, keys and flags exist, its values fit.

Each is given to what reads it, in this process, and goes no further. `tests/test_docs_typed.py` really runs them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from documented import PAGES, ROOT, Command, blocks, commands, kind, make_files, program_of
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

import morphtrain
from morphtrain import arguments, lr_finder, schema
from morphtrain.compare.__main__ import parse as parse_comparison
from morphtrain.compare.command import check_effect, sides_of
from morphtrain.errors import Incompatible, UserError
from morphtrain.experiment.declaration import declared, typed
from morphtrain.schema.names import OF_TEMPLATES
from morphtrain.sweep import launcher_errors
from morphtrain.sweep.search_space import SearchSpace, as_space, branches_of

# Programs that are not ours: what follows them is not checked here.
OF_OTHERS = (
    *("jupyter", "mkdocs", "mlflow", "optuna-dashboard", "tensorboard", "wandb", "netron", "twine"),
    *("export", "eval", "cd", "source"),
)
PACKAGES = ("jupyterlab", "netron", "optuna-dashboard", "optunahub")  # that `pip install` names beside our own
KINDS = {"commands", "python", "yaml", "toml", "file", "picture", "printed"}


class Parsed(Exception):
    """A command's own parser has taken its arguments."""


def shown() -> list[Any]:
    """Each command once, with the place where it is first shown."""
    found: dict[tuple[tuple[str, ...], str], Command] = {}
    for page in PAGES:
        for command in commands(page):
            found.setdefault((command.words, command.directory), command)
    assert len(found) > 120
    return [pytest.param(command, id=command.where) for command in found.values()]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the pages tell to make, and docs/examples as it is in a checkout."""
    directory = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "docs" / "examples", directory / "docs" / "examples")
    for page in PAGES:
        make_files(page, directory)
    return directory


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_known_to_be_something(page: Path) -> None:
    assert {kind(block) for block in blocks(page)} <= KINDS
    commands(page)  # raises for a line that begins with no known program


@pytest.mark.parametrize("command", shown())
def test_a_command_that_is_shown_can_be_typed(
    command: Command, reader: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *words = command.words
    directory = reader / command.directory
    monkeypatch.chdir(directory if directory.is_dir() else ROOT / command.directory)
    try:
        check(program, words, ROOT / command.directory, monkeypatch)
    except SystemExit as end:  # of argparse, which has said what is wrong
        assert end.code in (0, None), capsys.readouterr().err
    except Exception as error:
        if missing := launcher_errors.not_installed(error):
            pytest.skip(missing)
        raise


def check(program: str, words: Sequence[str], place: Path, patch: pytest.MonkeyPatch) -> None:
    """Give a command to what reads it; raises whatever is wrong with it."""
    if program == "python" and words[0] == "-m":
        check_module(words[1], words[2:], patch)
    elif program == "python":
        check_script(place / words[0], words[1:], patch)
    elif program == "morphtrain":
        check_console(words, patch)
    elif program == "torchrun":
        check_torchrun(words, patch)
    elif program in ("srun", "sudo"):
        first = next(number for number, word in enumerate(words) if not word.startswith("-"))
        check(program_of(words[first]), words[first + 1 :], place, patch)
    elif program == "make":
        check_make(words)
    elif program == "pip":
        check_pip(words)
    elif program == ".ci/run":
        assert (ROOT / program).is_file() and not words
    else:
        assert program in OF_OTHERS


def check_module(name: str, words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    own = {
        "morphtrain.run": check_run,
        "morphtrain.maxbatch": check_max_batch,
        "morphtrain.compare": check_compare,
        "morphtrain.lr_finder": check_lr_finder,
    }
    if name == "morphtrain":
        check_console(words, patch)
    elif name == "pytest":
        assert all((ROOT / word).exists() for word in words if not word.startswith("-"))
    elif name in own:
        own[name](words)
    else:
        assert name.startswith("morphtrain."), name
        has_main = importlib.util.find_spec(f"{name}.__main__") if is_package(name) else None
        module = importlib.import_module(f"{name}.__main__" if has_main else name)
        only_parsed(module.main, name, words, patch)


def is_package(name: str) -> bool:
    found = importlib.util.find_spec(name)
    assert found is not None, f"{name}: no such module"
    return found.submodule_search_locations is not None


def only_parsed(main: Callable[[], Any], name: str, words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """Call what argparse reads the arguments of, up to where it has."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: Any) -> None:
        original(self, *given)
        raise Parsed

    with patch.context() as context:
        context.setattr(sys, "argv", [name, *words])
        context.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed):
            main()


def check_script(path: Path, words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    assert path.is_file(), f"{path}: no such script"
    if path.parent.name == "notebooks":  # those of benchmarks take numbers, or nothing
        patch.syspath_prepend(str(path.parent))
        only_parsed(partial(runpy.run_path, str(path), run_name="__main__"), path.name, words, patch)


def check_console(words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """The command `morphtrain`, which pyproject.toml declares, and its commands, which are modules of that name."""
    scripts = section("project.scripts")
    entry = re.search(r"^morphtrain = \"([\w.]+):(\w+)\"", scripts, re.MULTILINE)
    assert entry, "pyproject.toml has no script of that name"
    assert callable(getattr(importlib.import_module(entry[1]), entry[2]))
    if words and not words[0].startswith("-"):
        command, *rest = as_run(words)
        check_module(f"morphtrain.{command}", rest, patch)


def as_run(words: Sequence[str]) -> list[str]:
    """A search or a grid as arguments of `run`; other commands as they are."""
    command, *rest = words
    if command != "sweep":
        return list(words)
    return ["run", f"+sweep={rest[0]}", *rest[1:]] if "=" not in rest[0] else ["run", "-m", *rest]


def check_torchrun(words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(list(words))
    assert given.module
    check_module(given.training_script, given.training_script_args, patch)


def check_make(targets: Sequence[str]) -> None:
    made = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, env=plain())
    assert made.returncode == 0, made.stderr


def plain() -> dict[str, str]:
    """The environment without what a make around the tests has put there."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def section(name: str) -> str:
    """A section of pyproject.toml, or nothing."""
    text = (ROOT / "pyproject.toml").read_text()
    return next((part for part in re.split(r"^(?=\[)", text, flags=re.MULTILINE) if part.startswith(f"[{name}]")), "")


def check_pip(words: Sequence[str]) -> None:
    assert words[0] == "install"
    extras = set(re.findall(r"^(\w+) = \[", section("project.optional-dependencies"), re.MULTILINE))
    for word in (word for word in words[1:] if not word.startswith("-")):
        ours = re.fullmatch(r"(?:morphtrain|\.)(?:\[([\w,]+)\])?", word)
        assert word in PACKAGES or ours, word
        assert ours is None or set((ours[1] or "").split(",")) - {""} <= extras, word


def test_the_guide_names_every_extra_and_what_templates_call_things() -> None:
    text = section("project.optional-dependencies")
    installing, coming = (
        (ROOT / "docs" / "guides" / f"{page}.md").read_text() for page in ("installing", "coming-from-a-template")
    )
    extras = [line for line in installing.splitlines() if line.startswith("| `")]
    assert [name for name in re.findall(r"^(\w+) = \[", text, re.MULTILINE) if f"`{name}`" not in str(extras)] == []
    assert [name for name in OF_TEMPLATES if f"`{name}" not in coming] == []


def check_run(words: Sequence[str]) -> None:
    flags = arguments.check_flags(arguments.prepared(words))
    if flags.shell_completion:  # install=bash is no key then
        return
    overrides = [override for override in flags.overrides if override != arguments.MULTIRUN]
    if any(re.match(r"\+sweep=|hydra/sweeper=", override) for override in overrides):
        return check_search(overrides, flags.config_dir)
    if any(override.startswith("+experiment=") for override in overrides):
        jobs = iter([list(only_composed(overrides))])
    else:
        jobs = jobs_of(overrides)
    for job in jobs:
        morphtrain.compose(*job, config_dir=flags.config_dir)


def check_search(overrides: Sequence[str], config_dir: str | None) -> None:
    """Its keys, and the trials at the ends of all ranges."""
    config = composed_with_hydra(next(jobs_of(overrides)), config_dir)
    sweeper: Any = OmegaConf.to_container(config.hydra.sweeper)
    schema.check_sweeper(sweeper)
    typed_and_preset = [*as_space(sweeper["params"]), *overrides]
    space = SearchSpace(typed_and_preset, None, config, branches_of(sweeper["params"]), sweeper["shares"])
    target = ["timing.target_accuracy=0.9"] if "+sweep=fastest" in overrides else []  # which is that of its trial 0
    for alternatives in space.corners()[:2]:  # those of each option are in tests/test_search_space.py
        mistakes = []
        for trial in alternatives:
            try:
                morphtrain.compose(*trial, *target, config_dir=config_dir)
            except UserError as error:
                mistakes.append(error)
        if len(mistakes) == len(alternatives) and not isinstance(mistakes[0], Incompatible):
            raise mistakes[0]


def only_composed(overrides: Sequence[str]) -> Iterator[str]:
    """Without seeds, of which an experiment takes several."""
    return (override for override in overrides if not override.startswith("seed="))


def jobs_of(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The runs of a grid that have, between them, each value that is typed and both ends of each range."""
    values = [list(values_of(parsed)) for parsed in OverridesParser.create().parse_overrides(list(overrides))]
    first = [value for value, *_ in values]
    yield first
    for place, (_, *others) in enumerate(values):
        yield from ([*first[:place], other, *first[place + 1 :]] for other in others)


def values_of(parsed: Override) -> Iterator[str]:
    assert parsed.input_line is not None
    key = parsed.get_key_element()
    if not parsed.is_sweep_override():
        yield parsed.input_line
    elif parsed.is_interval_sweep():
        interval: Any = parsed.value()
        yield from (f"{key}={end}" for end in (interval.start, interval.end))
    else:
        found = [f"{key}={value}" for value in parsed.sweep_string_iterator()]
        yield from found[:1] if key == "seed" else found


def composed_with_hydra(overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    with initialize_config_dir(str(schema.CONF)):
        return compose("config", overrides=[*searched(config_dir), *overrides], return_hydra_config=True)


def searched(config_dir: str | None) -> list[str]:
    return [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"]


def check_max_batch(words: Sequence[str]) -> None:
    flags = arguments.check_flags(arguments.prepared(words))
    with initialize_config_dir(str(schema.CONF)):
        schema.parse_max_batch(compose("maxbatch", overrides=list(flags.overrides)))


def check_compare(words: Sequence[str]) -> None:
    options, parts = parse_comparison(words)
    for overrides in sides_of(options, parts).values():
        check_effect("a comparison", overrides)
        morphtrain.compose(*overrides, config_dir=options.config_dir)


def check_lr_finder(words: Sequence[str]) -> None:
    options = lr_finder.parse(words)
    check_effect("a range test", options.overrides, besides=("schedule", "stop_at"))
    morphtrain.compose(*options.overrides, config_dir=options.config_dir)


def experiments() -> list[Any]:
    shown_ones = {
        command.words[3:]: pytest.param(command, id=command.where)
        for page in PAGES
        for command in commands(page)
        if command.words[:3] == ("python", "-m", "morphtrain.run") and "+experiment=" in command.text
    }
    return list(shown_ones.values())


@pytest.mark.slow
@pytest.mark.parametrize("command", experiments())
def test_all_arms_of_an_experiment_that_is_shown_compose(command: Command, reader: Path, monkeypatch: Any) -> None:
    """Ten compositions each."""
    monkeypatch.chdir(reader)
    flags = arguments.check_flags(command.words[3:])
    given = typed(flags.overrides)
    keys: Any = OmegaConf.to_container(composed_with_hydra(given.aside, flags.config_dir).hydra.sweeper)
    keys.pop("_target_")  # which Hydra keeps

    def composed(overrides: Sequence[str]) -> DictConfig:
        config = compose("config", overrides=[*searched(flags.config_dir), *overrides])
        with open_dict(config):
            config.pop("hydra", None)
        return config

    with initialize_config_dir(str(schema.CONF)):
        assert len(declared("shown", keys, given, composed).arms) >= 2


WRONG = {
    "python -m morphtrain.run prune=prunetrian": "prunetrian",
    "python -m morphtrain.run prune.laso_ratio=3 prune=prunetrain": "laso_ratio",
    "python -m morphtrain.run -m prune=prunetrain prune.interval=1,0": "prune.interval=0",
    "python -m morphtrain.run +sweep=prunetrain hydra.sweeper.n_trials=many": "n_trials",
    "python -m morphtrain.compare prune=none -- epoch=3": "epoch",
    "python -m morphtrain.maxbatch budgt=4GiB": "budgt",
    "python -m morphtrain.export last.pt --fromat onnx": "fromat",
    "python -m morphtrain.evidence test mine --by prune --metrics val_loss": "metrics",
    "python -m morphtrain.tested": "no such module",
    "python benchmarks/grwoth.py": "no such script",
    "torchrun --nproc-per-node=2 -m morphtrain.run epochs=few": "epochs",
    "make runs": "runs",
    "pip install 'morphtrain[slrum]'": "slrum",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_in_a_command_is_found(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Type\n\n    {text}\n")
    (command,) = commands(page)
    with pytest.raises((Exception, SystemExit)) as found:
        check(command.words[0], command.words[1:], ROOT, monkeypatch)
    assert WRONG[text] in f"{found.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("text", ["frobnicate --all", "make run\n    frobnicate --all", "12 of 20 right"])
def test_what_is_not_known_fails(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Type\n\n    {text}\n")
    with pytest.raises(AssertionError, match=r"page\.md:[34]"):
        test_every_block_is_known_to_be_something(page)
