"""Paths of modules, dotted as in `named_modules`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def prefixes(path: str) -> list[str]:
    """The path and all paths above it: a, a.b, a.b.c."""
    parts = path.split(".") if path else []
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def common_path(paths: list[str]) -> str:
    """The deepest module path that contains all of `paths`."""
    shared: list[str] = []
    for parts in zip(*(p.split(".") for p in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def is_within(path: str, parent: str) -> bool:
    """Whether `path` is the module `parent` or lies inside it."""
    return path == parent or path.startswith(parent + ".")


def is_ignored(path: str, ignore: Sequence[str]) -> bool:
    """Whether a module path, or one it lies in, matches one of the patterns."""
    return any(fnmatchcase(prefix, pattern) for pattern in ignore for prefix in prefixes(path))
