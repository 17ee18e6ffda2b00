"""Numbers of channels that a model's code reads off shapes and computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Count:
    """A number that depends on how many channels something has.

    Args:
        labels: (N,), of the channels that it counts.
        ratio: the number is N times this, whatever N is; None if it changes in another way.
    """

    labels: torch.Tensor
    ratio: Fraction | None = Fraction(1)

    def times(self, factor: Fraction) -> Count:
        """The product with a number that does not change."""
        return Count(self.labels, None if self.ratio is None else self.ratio * factor)


Counts = Sequence[Count | None]  # of a shape; None for a size that does not change


def computed(
    name: str, operands: Sequence[Any], counts: Sequence[Any], value: Any
) -> Count | tuple[Count | None, ...] | None:
    """What the result of arithmetic with numbers of channels counts; None if that cannot be told.

    Args:
        name: of the operation.
        operands: its arguments.
        counts: what they count; a tuple for a shape, None for a number that does not change.
        value: the result.
    """
    if name == "add" and isinstance(value, tuple):  # x.shape[:2] + (4, 4)
        parts = [c if isinstance(c, tuple) else (None,) * len(o) for c, o in zip(counts, operands, strict=True)]
        return tuple(part for shape in parts for part in shape)
    numbers = all(isinstance(operand, (int, float)) for operand in operands)
    result = _arithmetic(name, operands, counts) if numbers else None
    fits = result is not None and result.ratio is not None and value == len(result.labels) * result.ratio
    return result if fits else None


def _arithmetic(name: str, operands: Sequence[Any], counts: Counts) -> Count | None:
    if name == "neg" and counts[0] is not None:
        return counts[0].times(Fraction(-1))
    if len(operands) != 2:
        return None
    (left, right), (a, b), name = counts, operands, name.removeprefix("i")
    if name == "mul" and (left is None) != (right is None):
        return left.times(Fraction(b)) if left is not None else right.times(Fraction(a))  # type: ignore[union-attr]
    if name in ("floordiv", "truediv") and left is not None and right is None and b != 0:
        return left.times(1 / Fraction(b))
    if name in ("add", "sub") and left is not None and right is not None:
        return _combined(left, right, subtract=name == "sub")
    return None


def _combined(left: Count, right: Count, subtract: bool) -> Count | None:
    """c // 2 + c // 4, c - c // 2, or the channels of two activations together."""
    if left.ratio is None or right.ratio is None:
        return None
    if torch.equal(left.labels, right.labels):
        return Count(left.labels, left.ratio - right.ratio if subtract else left.ratio + right.ratio)
    if not subtract and left.ratio == right.ratio == 1:
        return Count(torch.cat([left.labels, right.labels]))
    return None
