"""Options of the group `loss`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.option import Option


@dataclass
class Loss(Option, group="loss", plain=("cross_entropy",)):
    """Base of the losses."""
