"""The error of this package."""

from __future__ import annotations


class MorphError(ValueError):
    """The network, or the requested change, is beyond what `morphtrain.morph` can do without a wrong result."""
