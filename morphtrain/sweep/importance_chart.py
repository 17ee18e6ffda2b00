"""How much each searched key matters, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from morphtrain.sweep.importance import Importance


def bars(axes: Any, told: Sequence[Importance]) -> None:
    """The shares of each key, a bar for each method; the key that matters most to the first method is on top.

    Args:
        told: one or more, each with shares.
    """
    keys = list(dict.fromkeys(key for found in told for key in found.shares))[::-1]
    height = 0.8 / len(told)
    for place, found in enumerate(told):
        rows = [row + height * ((len(told) - 1) / 2 - place) for row in range(len(keys))]
        shares = [found.shares.get(key, 0.0) for key in keys]
        drawn = axes.barh(rows, shares, height, label=f"{found.what} ({found.method})")
        axes.bar_label(drawn, [f"{found.shares[key]:.2f}" if key in found.shares else "-" for key in keys], padding=3)
    axes.set_yticks(range(len(keys)), keys)
    axes.set_xlim(0, 1.1 * max(max(found.shares.values()) for found in told))
    axes.set_xlabel("share of the importance")
    axes.grid(False, axis="y")
    axes.set_title("How much each key matters")
    axes.figure.legend(loc="outside lower center")
