"""Paths of modules, dotted as in `named_modules`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def prefixes(path: str) -> list[str]:
    """The path and all paths above it, the shortest first: a, a.b, a.b.c."""
    parts = path.split(".") if path else []
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def is_within(path: str, parent: str) -> bool:
    """Whether `path` is the module `parent` or lies inside it."""
    return path == parent or path.startswith(parent + ".")


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a module's path, or the path of a module that contains it, matches one of the `fnmatch` patterns."""
    return any(fnmatchcase(prefix, pattern) for pattern in patterns for prefix in prefixes(path))
