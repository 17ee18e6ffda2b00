"""Epochs as shares of the run, which follow `epochs`: those of `grow.at_epochs=[25%]`, and those that have ended."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, get_origin, get_type_hints

from morphtrain.schema.checks import check

SHARE = re.compile(r"\d+(\.\d+)?%")


def in_epochs(kind: type, values: Mapping[str, Any], epochs: int, at: str) -> dict[str, Any]:
    """Those of an option's values that are shares of the run, as whole epochs, 1 or more.

    Args:
        kind: the option, whose `epoch_keys` may be shares.
        at: where its keys are, for messages.

    Raises:
        UserError: for a share of nothing, or of more than the run.
    """
    lists = {key: get_origin(hint) is list for key, hint in get_type_hints(kind).items()}
    keys = [key for key in getattr(kind, "epoch_keys", ()) if key in values]
    keys = [key for key in keys if isinstance(values[key], list) == lists[key]]  # others are of a wrong type
    found = {key: _whole(values[key], epochs, f"{at}.{key}") for key in keys}
    return {key: whole for key, whole in found.items() if whole != values[key]}


def _whole(value: Any, epochs: int, key: str) -> Any:
    if isinstance(value, list):
        return [_whole(one, epochs, key) for one in value]
    if not isinstance(value, str) or not SHARE.fullmatch(value):
        return value
    share = float(value[:-1]) / 100
    check(0 < share <= 1, key, value, "above 0% and at most 100%, as a share of the run")
    return max(1, round(share * epochs))


def ended(share: float, epochs: int) -> int:
    """How many epochs have ended after this share of them; 0.29 * 100, which is a little less than 29, is 29."""
    return math.floor(share * epochs + 1e-9)
