"""What an exported file says of itself: its network, its inputs and outputs, and the run that it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import nn

from morphtrain.cost import count_params
from morphtrain.preprocessing import Preprocessing
from morphtrain.wording import printable


@dataclass(frozen=True)
class About:
    """What is known of a network that is exported; `run`: what it came from, by name."""

    preprocessing: Preprocessing
    run: Mapping[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> str:
        """How images become inputs, in a sentence."""
        said = self.preprocessing
        if said.mean is None or said.std is None:
            return "Images (batch, channels, height, width), normalised as they were for training, which is not known."
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (said.mean, said.std))
        bright = "" if said.max_pixel is None else f", of pixels up to {said.max_pixel:g}"
        return f"Images (batch, channels, height, width) as (pixels - mean) / std, mean {mean}, std {std}{bright}."

    @property
    def outputs(self) -> str:
        """What the outputs stand for, in a sentence."""
        classes = self.preprocessing.classes
        named = "" if classes is None else f": {', '.join(classes)}"
        return printable(f"A number a class (batch, classes), before softmax{named}.")

    def facts(self, network: nn.Module) -> dict[str, str]:
        """The network's class and size, each known field of the preprocessing as JSON, and the run."""
        known = {name: value for name, value in asdict(self.preprocessing).items() if value is not None}
        size = {"network": type(network).__qualname__, "parameters": str(count_params(network))}
        return {**size, **{name: json.dumps(value) for name, value in known.items()}, **self.run}
