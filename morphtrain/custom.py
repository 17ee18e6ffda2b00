"""A user's own part of a run: its class, or a function that makes it, by dotted path.

python -m morphtrain.run model=custom model._target_=my_package.Net +model.width=32

Every key except `_target_` is a keyword of the call. What the group is given (`num_classes` for a model, `epochs` for a
schedule) comes from the run if the callable takes it and the config does not set it. What a *config* names is imported,
because the user wrote it; but it is called only if it can be a part of a run (`options.check_maker`), not if it is,
say, `os.system`. What a *checkpoint* names is not even imported, since a file must not decide what runs: see
`of_checkpoint`.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from morphtrain import schema
from morphtrain.errors import UserError, said


def find(key: str, target: str) -> Callable[..., Any]:
    """Import the callable at this dotted path; the current directory is searched too, as with `python -m`.

    It has to be a class, or a function written in Python, from outside Python's standard library, which has no part of
    a run but much that harms when it is called or merely imported.

    Raises:
        UserError: naming config key `key`, if there is no such module or name, or it is something else.
    """
    module_name, _, name = target.rpartition(".")
    _refuse_pythons_own(key, target, module_name)
    module = _import(key, target, module_name)
    if not hasattr(module, name):
        raise UserError(f"{key}._target_={target}: {module_name} has no {name}; {_contents_hint(key, module, name)}")
    found = getattr(module, name)
    if isinstance(found, nn.Module) or not callable(found):
        kind = type(found).__name__
        raise UserError(
            f"{key}._target_={target}: is an object of type {kind}; name a class, or a function that makes one"
        )
    _refuse_pythons_own(key, target, _home(found))  # it may have been imported from there
    return found


def _refuse_pythons_own(key: str, target: str, module_name: str) -> None:
    top = module_name.partition(".")[0]
    if top in sys.stdlib_module_names:
        wanted = f"a class or function of your own or of a package (a module of your own cannot be called {top})"
        raise UserError(f"{key}._target_={target}: is of Python's own module {module_name}; name {wanted}")


def _home(found: Callable[..., Any]) -> str:
    """The module that a class or function is defined in, behind decorators and `functools.partial`."""
    while isinstance(found, functools.partial):
        found = found.func
    found = inspect.unwrap(found)
    if inspect.isbuiltin(found):
        return "builtins"  # compiled: nothing says what it does, whichever module it says it is from
    return str((found if inspect.isfunction(found) or isinstance(found, type) else type(found)).__module__)


def _import(key: str, target: str, module_name: str) -> ModuleType:
    try:
        # A module that draws random numbers while it is imported must not shift those of the network: the next run of
        # a sweep, or `morphtrain.load`, finds it already imported.
        with torch.random.fork_rng(devices=[]):
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            where = f"there is no module {error.name}, neither in the current directory ({Path.cwd()}) nor installed"
            raise UserError(f"{key}._target_={target}: {where}; PYTHONPATH adds more places") from error
        raise UserError(f"{key}._target_={target}: importing {module_name} fails: {error}") from error
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a script calls sys.exit, which would end the run as if it were done
        raise UserError(f"{key}._target_={target}: importing {module_name} fails: {said(error)}") from error


def _contents_hint(key: str, module: ModuleType, name: str) -> str:
    """A hint: names close to `name`, or else what `module` defines; for a model, its networks."""
    close = difflib.get_close_matches(name, [n for n in vars(module) if n.startswith("_") <= name.startswith("_")], n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    defined = {n: v for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__}
    if key == "model":
        networks = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, nn.Module)]
        return f"its networks: {', '.join(networks) or 'none'}"
    return f"it defines {', '.join(n for n, v in defined.items() if callable(v)) or 'nothing that can be called'}"


def annotated(make: Callable[..., Any]) -> type | None:
    """The class that a function says it returns; None if it does not say, or says it in a way not understood here."""
    try:
        named = inspect.signature(make, eval_str=True).return_annotation
    except Exception:  # noqa: BLE001 (an annotation is any expression, often of names that exist for type checkers only)
        return None
    named = type(None) if named is None else typing.get_origin(named) or named
    return named if isinstance(named, type) and named not in (inspect.Signature.empty, Any) else None


def construct(key: str, make: Callable[..., Any], config: schema.Custom, given: Mapping[str, Any]) -> Any:
    """Call `make` with the config's keywords, and with those of `given` that it takes and the config does not set.

    Raises:
        UserError: naming config key `key`, if the call fails.
    """
    anything = key == "model"  # networks pass **keywords on; others would fail on, say, `epochs`
    offered = {name: value for name, value in given.items() if _takes(make, name, anything)}
    try:
        # A copy: a constructor that empties a list must not change what the checkpoints will hold.
        return make(**offered | copy.deepcopy(config.arguments))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        shown = {name: value for name, value in offered.items() if isinstance(value, (int, str))} | config.arguments
        called = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        name = f"{key}._target_={config._target_}"
        hint = f"; it is called to return the {_what(key)}" if isinstance(error, TypeError) else ""
        raise UserError(f"{name}: called with ({called}): {said(error)}{hint}") from error


def _what(key: str) -> str:
    """What the call returns: those who name a loss function itself read that it was called to make one."""
    return "method" if key.startswith("methods") else key.replace("_", " ")


def _takes(make: Callable[..., Any], keyword: str, anything: bool) -> bool:
    """Whether a callable has this parameter, or takes any keyword and `anything` counts."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # compiled code may have none
        return False
    named = parameters.get(keyword)
    if named is not None:
        return named.kind in (named.POSITIONAL_OR_KEYWORD, named.KEYWORD_ONLY)
    return anything and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def of_checkpoint(target: str) -> type[nn.Module]:
    """The class a checkpoint names, if the caller has imported it already. Nothing is imported or called.

    It has to be a subclass of `torch.nn.Module` from the package the path begins with: not a function, and nothing
    that the package imported from elsewhere.

    Raises:
        UserError: if there is no such class; the message says how to load the checkpoint anyway.
    """
    module_name, _, name = target.rpartition(".")
    module = sys.modules.get(module_name)
    if module is None:
        raise UserError(f"the network is {target}: import {module_name} first, or pass model=")
    # Not getattr: a module's own __getattr__ would run, and may import, because a file says so.
    found = vars(module).get(name)
    if isinstance(found, type) and issubclass(found, nn.Module):
        home = found.__module__
        if home.partition(".")[0] == module_name.partition(".")[0]:
            return found
    raise UserError(f"the network is {target}, which is not a network class defined there; pass model={target}")
