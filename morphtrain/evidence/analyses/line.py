"""The response as a straight line of what the experiment varies, and the bands in which it and new runs lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphtrain.evidence import drawing, words
from morphtrain.evidence.experiment import Experiment
from morphtrain.evidence.pictures import Picture
from morphtrain.evidence.records import ends
from morphtrain.evidence.regressions import LEAST_POINTS, Coefficient, Line, fit_line
from morphtrain.evidence.section import Section, Table
from morphtrain.wording import counted

if TYPE_CHECKING:
    import pandas as pd

PLACES = 60  # of the drawn bands


def section(experiment: Experiment, table: pd.DataFrame) -> Section:
    """The slope, the line's fit, and the points."""
    assert experiment.x is not None  # the declaration checks it
    points = _points(experiment, table)
    if points["x"].nunique() < LEAST_POINTS:
        return Section(
            f"Nothing can be said yet: a line with an interval needs {LEAST_POINTS} different values of "
            f"{experiment.x}, finished, and there are {points['x'].nunique()}.",
            "None, with so few points.",
        )
    names = experiment.x, _name(experiment)
    if len(set(points["y"])) == 1:
        value, runs = words.number(points["y"].iloc[0]), counted(len(points), "run")
        answer = f"{words.sentence(names[1])} does not change with {names[0]}: it is {value} in all n = {runs}."
        return Section(answer, "None: there is no scatter.", (_point_table(points, names),))
    fit = fit_line(list(points["x"]), list(points["y"]), names=names)
    return Section(
        answer=_answer(fit),
        test=_test(fit),
        tables=(_coefficients(fit), _point_table(points, names)),
        picture=_picture(fit, points),
        slope=fit.slope,
    )


def _name(experiment: Experiment) -> str:
    name = experiment.y or experiment.response
    return f"1 / {name}" if experiment.inverse else name


def _points(experiment: Experiment, table: pd.DataFrame) -> pd.DataFrame:
    """Arm, seed, x and y of every finished run that has both as finite numbers."""
    import numpy as np
    import pandas as pd

    x, y = experiment.x, experiment.y or experiment.response
    last = ends(table)
    if x not in last or y not in last:
        return pd.DataFrame(columns=["arm", "seed", "x", "y"])
    numbers = {name: pd.to_numeric(last[key], errors="coerce").astype(float) for name, key in (("x", x), ("y", y))}
    found = pd.DataFrame({"arm": last["arm"], "seed": last["seed"], **numbers})
    if experiment.inverse:
        found["y"] = 1 / found["y"]
    found = found.replace([np.inf, -np.inf], np.nan).dropna()
    return found[found["arm"].isin(list(experiment.arms))]


def _answer(fit: Line) -> str:
    slope = words.interval(fit.slope.value, fit.slope.low, fit.slope.high, signed=True)
    law = "; the points lie on the line, it is a law" if fit.exact else ""
    return (
        f"{words.sentence(fit.y)} changes by {slope} for each 1 of {fit.x} "
        f"(n = {counted(fit.points, 'run')}, R² = {fit.r_squared:.4f}{law})."
    )


def _test(fit: Line) -> str:
    if fit.exact:
        return (
            "Least squares. The points lie on the line up to rounding error, so t and p would only measure that error; "
            "an interval says nothing here that the slope does not."
        )
    checked = "not enough points to check how they scatter" if fit.diagnostics is None else str(fit.diagnostics)
    errors = "; the points do not scatter alike everywhere, so errors and tests are HC3" if fit.robust else ""
    return (
        f"Least squares; t test of the hypothesis that the slope is 0: t({fit.points - 2}) = {fit.slope.t:.4g}, "
        f"{words.p_value(fit.slope.p)}; F(1, {fit.points - 2}) = {fit.f:.4g}. It says how surely y rises or falls with "
        f"x, not that a line is the right form: for that look at the points and at R². Residuals: {checked}{errors}."
    )


def _coefficients(fit: Line) -> Table:
    import pandas as pd

    rows = {"slope": _row(fit.slope, fit.exact), "intercept": _row(fit.intercept, fit.exact)}
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("coefficient")
    return Table(
        "line", f"{words.sentence(fit.y)} against {fit.x}: {fit.points} points, R² = {fit.r_squared:.6f}.", frame
    )


def _row(found: Coefficient, exact: bool) -> dict[str, float]:
    row = {"estimate": found.value, "estimate low": found.low, "estimate high": found.high}
    return row if exact else {**row, "standard error": found.standard_error, "t": found.t, "p": found.p}


def _point_table(points: pd.DataFrame, names: tuple[str, str]) -> Table:
    shown = points.rename(columns={"x": names[0], "y": names[1]}).set_index("arm")
    return Table("points", "The points, a run each.", shown)


def _picture(fit: Line, points: pd.DataFrame) -> Picture:
    low, high = points["x"].min(), points["x"].max()
    places = [fit.predict(low + (high - low) * step / PLACES) for step in range(PLACES + 1)]
    data = list(zip(points["x"], points["y"], strict=True))
    return Picture(
        title=f"{words.sentence(fit.y)} against {fit.x}: the runs, the line, and its bands.",
        description=f"{fit.points} points and a straight line. {_answer(fit)}",
        draw=lambda axes: drawing.line(axes, data, places, (fit.x, fit.y)),
    )
