"""The linear fits (ordinary least squares) of the thesis's chapter on batch sizes, with their uncertainty.

print(inverse_batch_against_blocks([1, 2, 3, 4], [2704, 1472, 1024, 784]))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_POINTS = 3  # two points always lie on a line
ROUNDING = 1e-12  # of the variance: a smaller residual is rounding error, not scatter


@dataclass(frozen=True)
class Coefficient:
    """An estimate with standard error, t and two-sided p of the hypothesis that it is 0, and confidence interval."""

    value: float
    standard_error: float
    t: float
    p: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.5g} [{self.low:.5g}, {self.high:.5g}], t = {self.t:.4g}, p = {self.p:.3g}"


@dataclass(frozen=True)
class Line:
    """y = intercept + slope * x, fitted to `points` points; `confidence` is the level of the intervals, e.g. 0.95."""

    x: str
    y: str
    slope: Coefficient
    intercept: Coefficient
    r_squared: float
    points: int
    confidence: float

    @property
    def exact(self) -> bool:
        """Whether the points lie on the line up to rounding error; then t, p and the intervals mean nothing."""
        return 1 - self.r_squared < ROUNDING

    def __str__(self) -> str:
        lines = [
            f"{self.y} against {self.x} ({self.points} points, R^2 = {self.r_squared:.6f}, "
            f"intervals of {self.confidence:.0%})",
            f"  slope     {self.slope}",
            f"  intercept {self.intercept}",
        ]
        if self.exact:
            lines.append("  a law, not a sample: the points lie on the line, so t and p measure only rounding error")
        return "\n".join(lines)


def fit_line(x: Sequence[float], y: Sequence[float], *, names: tuple[str, str], confidence: float = 0.95) -> Line:
    """The least-squares line of `y` against `x`; `names` are those of x and y, in this order.

    Raises:
        ValueError: for fewer than three points, unequal lengths, numbers that are not finite, or if all x are equal.
    """
    _check(x, y)
    import numpy as np
    from statsmodels.api import OLS, add_constant

    result = OLS(np.asarray(y, float), add_constant(np.asarray(x, float))).fit()
    intervals = result.conf_int(alpha=1 - confidence)
    intercept, slope = (
        Coefficient(*(float(value) for value in (*numbers, *interval)))
        for numbers, interval in zip(
            zip(result.params, result.bse, result.tvalues, result.pvalues, strict=True), intervals, strict=True
        )
    )
    return Line(*names, slope, intercept, float(result.rsquared), len(x), confidence)


def inverse_batch_against_blocks(blocks: Sequence[float], batches: Sequence[float], confidence: float = 0.95) -> Line:
    """Fit 1/B, B the largest batch, against the blocks n per stage: linear if all blocks use equal memory per sample.

    B = M / (stem + n * block) for M bytes of memory, so 1/B = stem / M + n * block / M.

    Raises:
        ValueError: if a batch is not above 0, or like `fit_line`.
    """
    if min(batches, default=1) <= 0:
        raise ValueError(f"batches={list(batches)}: must all be above 0")
    inverse = [1 / batch for batch in batches]
    return fit_line(blocks, inverse, names=("blocks a stage", "1 / largest batch"), confidence=confidence)


def params_against_blocks(blocks: Sequence[float], params: Sequence[float], confidence: float = 0.95) -> Line:
    """Fit the number of parameters against the blocks per stage: each block adds the same number."""
    return fit_line(blocks, params, names=("blocks a stage", "parameters"), confidence=confidence)


def memory_against_batch(batches: Sequence[float], sizes: Sequence[float], confidence: float = 0.95) -> Line:
    """Fit the bytes of a training step against its batch size: intercept fixed, slope per sample."""
    return fit_line(batches, sizes, names=("batch", "bytes"), confidence=confidence)


def _check(x: Sequence[float], y: Sequence[float]) -> None:
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values of x and {len(y)} of y: must be the same number")
    if len(x) < LEAST_POINTS:
        raise ValueError(f"{len(x)} points: a line with an interval needs {LEAST_POINTS} or more")
    if not all(map(math.isfinite, (*x, *y))):
        raise ValueError("not every number in x and y is finite")
    if len(set(x)) == 1:
        raise ValueError(f"every x is {x[0]}: a line needs two or more different values")
