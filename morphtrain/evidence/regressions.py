"""The linear fits (ordinary least squares) of the thesis's chapter on batch sizes, with their uncertainty.

print(inverse_batch_against_blocks([1, 2, 3, 4], [2704, 1472, 1024, 784]))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST_POINTS = 3  # two points always lie on a line
LEAST_FOR_DIAGNOSTICS = 8  # with fewer, the tests of residuals find next to nothing
SUSPICIOUS = 0.05  # p below which points count as scattering unequally
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
class Diagnostics:
    """Whether the points scatter about a line as its tests and intervals suppose.

    Args:
        breusch_pagan: p of the hypothesis that they scatter alike everywhere (Breusch and Pagan 1979, with Koenker's
            studentised statistic).
        shapiro_wilk: p of the hypothesis that the residuals are normal.
        cooks_distance: the largest (Cook 1977), and `furthest`, the number from 0 of its point.
        influential: the numbers of the points beyond 4 / n, which alone move the line noticeably.
    """

    breusch_pagan: float
    shapiro_wilk: float
    cooks_distance: float
    furthest: int
    influential: tuple[int, ...]

    def __str__(self) -> str:
        text = (
            f"scatter alike everywhere p = {self.breusch_pagan:.3g} (Breusch-Pagan), residuals normal "
            f"p = {self.shapiro_wilk:.3g} (Shapiro-Wilk), largest Cook's distance {self.cooks_distance:.3g}"
        )
        if self.influential:
            text += f"; look at point {', '.join(str(point + 1) for point in self.influential)}, beyond 4 / n"
        return text


@dataclass(frozen=True)
class Prediction:
    """The line at `x`: its mean there with a confidence interval, and the interval in which a new point would lie."""

    x: float
    mean: float
    low: float
    high: float
    new_low: float
    new_high: float


@dataclass(frozen=True)
class Line:
    """y = intercept + slope * x, fitted to `points` points; `confidence` is the level of the intervals, e.g. 0.95.

    `f` and `f_p` are of the hypothesis that y does not depend on x. With `robust`, errors and tests are HC3 (MacKinnon
    and White 1985), which hold also where the points scatter more in one place than in another.
    """

    x: str
    y: str
    slope: Coefficient
    intercept: Coefficient
    f: float
    f_p: float
    r_squared: float
    points: int
    confidence: float
    robust: bool
    diagnostics: Diagnostics | None  # None for fewer points than can show anything, or an exact line
    fitted: Any = field(repr=False, compare=False)  # statsmodels' results

    @property
    def exact(self) -> bool:
        """Whether the points lie on the line up to rounding error; then t, p and the intervals mean nothing."""
        return 1 - self.r_squared < ROUNDING

    def predict(self, x: float) -> Prediction:
        """The line at `x`. The interval of a new point supposes that points scatter alike everywhere."""
        found = self.fitted.get_prediction([[1.0, x]])
        alpha = 1 - self.confidence
        (ends,), (new,) = found.conf_int(alpha=alpha), found.conf_int(obs=True, alpha=alpha)
        return Prediction(x, float(found.predicted[0]), *map(float, (*ends, *new)))

    def __str__(self) -> str:
        lines = [
            f"{self.y} against {self.x} ({self.points} points, R^2 = {self.r_squared:.6f}, "
            f"F(1, {self.points - 2}) = {self.f:.4g}, intervals of {self.confidence:.0%})",
            f"  slope     {self.slope}",
            f"  intercept {self.intercept}",
        ]
        if self.exact:
            lines.append("  a law, not a sample: the points lie on the line, so t and p measure only rounding error")
        elif self.diagnostics is None:
            lines.append(f"  not checked: the scatter of fewer than {LEAST_FOR_DIAGNOSTICS} points shows nothing")
        else:
            lines.append(f"  {self.diagnostics}")
        if self.robust:
            lines.append("  the points do not scatter alike everywhere: errors and tests are HC3")
        return "\n".join(lines)


def fit_line(
    x: Sequence[float],
    y: Sequence[float],
    *,
    names: tuple[str, str],
    confidence: float = 0.95,
    robust: bool | None = None,
) -> Line:
    """The least-squares line of `y` against `x`; `names` are those of x and y, in this order.

    Args:
        robust: HC3 errors; None: if the test of Breusch and Pagan rejects, at 0.05, that the points scatter alike
            everywhere. Fewer than eight points are not tested.

    Raises:
        ValueError: for fewer than three points, unequal lengths, numbers that are not finite, or if all x are equal;
            with `robust`, if one point alone decides the slope.
    """
    _check(x, y)
    import numpy as np
    from statsmodels.api import OLS, add_constant

    result = OLS(np.asarray(y, float), add_constant(np.asarray(x, float))).fit()
    exact = 1 - result.rsquared < ROUNDING
    diagnostics = None if exact or len(x) < LEAST_FOR_DIAGNOSTICS else _diagnostics(result)
    alone = result.get_influence().hat_matrix_diag.max() > 1 - ROUNDING  # its residual is 0, and HC3 divides by that
    if robust and alone:
        raise ValueError("robust=True: one point alone decides the slope, so that HC3 has no error for it")
    if robust is None:
        robust = diagnostics is not None and diagnostics.breusch_pagan < SUSPICIOUS and not alone
    if robust:
        result = result.get_robustcov_results("HC3", use_t=True)
    intervals = result.conf_int(alpha=1 - confidence)
    intercept, slope = (
        Coefficient(*(float(value) for value in (*numbers, *interval)))
        for numbers, interval in zip(
            zip(result.params, result.bse, result.tvalues, result.pvalues, strict=True), intervals, strict=True
        )
    )
    return Line(
        *names,
        slope,
        intercept,
        f=float(np.squeeze(result.fvalue)),
        f_p=float(np.squeeze(result.f_pvalue)),
        r_squared=float(result.rsquared),
        points=len(x),
        confidence=confidence,
        robust=robust,
        diagnostics=diagnostics,
        fitted=result,
    )


def _diagnostics(result: Any) -> Diagnostics:
    from scipy import stats
    from statsmodels.stats.diagnostic import het_breuschpagan

    distances = result.get_influence().cooks_distance[0]
    return Diagnostics(
        float(het_breuschpagan(result.resid, result.model.exog)[1]),
        float(stats.shapiro(result.resid).pvalue),
        float(distances.max()),
        int(distances.argmax()),
        tuple(point for point, distance in enumerate(distances) if distance > 4 / len(distances)),
    )


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
    if len(set(y)) == 1:
        raise ValueError(f"every y is {y[0]}: there is nothing that a line could explain")
