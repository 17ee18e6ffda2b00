"""A user's own part of a run, in any group: the dotted path of what makes it, and the keywords of the call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from morphtrain.schema.checks import check


@dataclass
class Custom:
    """Any node with a `_target_`; all its other keys are keywords of the call."""

    _target_: str
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self._target_

    def check(self, key: str) -> None:
        """Raise a `UserError` naming config key `key` (`model`, `methods[0]`) unless the node there can be called."""
        parts = self._target_.split(".")
        dotted = len(parts) > 1 and all(part.isidentifier() for part in parts)
        check(dotted, f"{key}._target_", self._target_, "a class or function with its module, as in my_package.Net")
        for name, value in self.arguments.items():
            check_plain(f"{key}.{name}", name, value)
            hydras = name.startswith("_") and name.endswith("_")
            check(not hydras, f"{key}.{name}", value, "left out: of Hydra's keys only _target_ is supported")


def check_plain(path: str, key: object, value: object) -> None:
    """Raise a `UserError` naming `path` unless its last part, `key`, and its value survive JSON."""
    try:
        survives = json.loads(json.dumps({key: value})) == {key: value}
    except TypeError:
        survives = False
    check(survives, path, value, "text, a number, true, false, null, or a list or dict (keys: text) of these")
