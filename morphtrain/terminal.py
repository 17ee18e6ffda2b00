"""The console for what keeps its place on the terminal: the bar of an epoch, and the line of its sweep below."""

from __future__ import annotations

import functools

from rich.console import Console


@functools.cache
def drawing() -> Console:
    """One for all: what rich draws at the same time has to share a console, or each would draw over the other.

    Lines that are printed meanwhile go through it, and are left whole: a command among them can be copied.
    """
    return Console(stderr=True, soft_wrap=True)
