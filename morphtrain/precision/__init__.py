"""Number formats: one module an option of the `precision` group, each of which builds a `Precision`."""

from morphtrain.precision.autocast import Precision

__all__ = ["Precision"]
