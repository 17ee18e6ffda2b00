"""How every picture looks: colours, marks, lines, letters and sizes, in this one place.

No two of the six series share a colour, a mark or a line, so that a picture can be read in grey and by those who do not
tell red from green. Pictures on a page take the page's colours, light or dark (`morphtrain.report.svg`).

In a notebook, `style.use()` gives what follows this look.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from morphtrain.files import write_atomically
from morphtrain.wording import printable


@dataclass(frozen=True)
class Theme:
    """The colours of pictures on one kind of paper; series stand out from it by 3 to 1 or more (WCAG 2, 1.4.11)."""

    ink: str
    rule: str  # of grids, and of what stays in the background
    paper: str
    series: tuple[str, ...]


LIGHT = Theme("#1b1b1d", "#c8c8cc", "#fefefd", ("#0b4a8f", "#d55e00", "#117733", "#c2649f", "#5c4a00", "#3a93c9"))
DARK = Theme("#e8e8ea", "#44464d", "#17181b", ("#7db0ff", "#ff8c42", "#5fc878", "#d071a8", "#f5f0c0", "#9be7f7"))
INK, RULE, PAPER, SERIES = LIGHT.ink, LIGHT.rule, LIGHT.paper, LIGHT.series
SHADES, SHADES_DOWN = "viridis_r", "viridis"  # of many ordered things: the last, or the first, the darkest
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))

SIZE = (7.0, 4.0)  # inches, of a picture with one pair of axes
DOTS = 110  # an inch, of a PNG
SMALL, LETTERS, TITLE = 9.0, 11.0, 13.0  # points


@dataclass(frozen=True)
class Look:
    """How a series is drawn."""

    color: str
    marker: str
    linestyle: Any


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, in order: the first six differ in colour, marker and line."""
    looks = zip(cycle(SERIES), cycle(MARKERS), cycle(LINES), strict=False)
    return {name: Look(*look) for name, look in zip(names, looks, strict=False)}


def settings() -> dict[str, Any]:
    """The look as settings of matplotlib (`rcParams`); the paper is left out, for pictures that lie on a page."""
    from cycler import cycler

    return {
        **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
        **{"axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK, "legend.labelcolor": INK},
        **{"axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none"},
        **{"axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6, "axes.axisbelow": True},
        **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
        **{"font.size": LETTERS, "lines.linewidth": 1.8, "lines.markersize": 6.0, "text.parse_math": False},
        **{"axes.titlesize": 10.0, "axes.titlelocation": "left", "legend.fontsize": SMALL},
        **{"figure.titlesize": TITLE, "figure.titleweight": "bold"},
        **{"figure.figsize": SIZE, "figure.dpi": DOTS, "savefig.dpi": DOTS, "image.cmap": SHADES_DOWN},
        "axes.prop_cycle": cycler(color=SERIES) + cycler(linestyle=LINES),
        "svg.fonttype": "none",  # text stays text: it is searched, read aloud, and takes the page's font
        "svg.hashsalt": "morphtrain",  # the same ids every time
    }


def use() -> None:
    """Let what pyplot draws from now on have this look, on white paper; for notebooks."""
    import matplotlib

    paper = {"figure.facecolor": PAPER, "savefig.facecolor": PAPER}
    matplotlib.rcParams.update(settings() | paper | {"text.parse_math": True})  # as ticks of logarithms are


@contextmanager
def in_style() -> Iterator[None]:
    """Let what is drawn within the block have this look."""
    from matplotlib import rc_context

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    with rc_context(settings()):
        yield


@contextmanager
def figure(size: tuple[float, float] = SIZE) -> Iterator[Any]:
    """An empty figure of matplotlib, of so many inches; draw and save it within the block."""
    from matplotlib.figure import Figure

    with in_style():
        yield Figure(figsize=size, layout="constrained")


def save(figure: Any, path: Path, description: str, **options: Any) -> None:
    """Write a figure as a PNG, whole or not at all, and in it what it shows in words.

    Args:
        description: for those who cannot see it; in the PNG's text `Description`.
        options: of matplotlib's `savefig`.

    Raises:
        OSError: if it cannot be written.
    """
    content = io.BytesIO()
    said = {"Description": printable(description)}
    figure.savefig(content, format="png", dpi=DOTS, facecolor=PAPER, metadata=said, **options)
    write_atomically(path, content.getvalue())


def headline(figure: Any, text: str) -> None:
    """What is to be seen, above all panels; on two lines if it is long."""
    figure.suptitle(printable(text), x=0.01, horizontalalignment="left", wrap=True)


def log_ticks(axis: Any) -> None:
    """Plain numbers at powers of ten, of few also between them; where these are too few, wherever they fit."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 1.3 else (1.0, 3.0) if decades < 3 else (1.0,)
    ticks = [tick for tick in LogLocator(subs=subs, numticks=12).tick_values(low, high) if low <= tick <= high]
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def whole_epochs(axes: Any) -> None:
    """Ticks of x at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def label_y(axes: Any, label: str) -> None:
    """Call the vertical axis `label`, and say so if it does not begin at 0; call this when all is drawn."""
    low, _ = axes.get_ylim()
    axes.set_ylabel(f"{label}\n(axis begins at {low:.3g})" if low > 0 else label)


def label_ends(axes: Any, ends: Sequence[tuple[float, str, Look]]) -> bool:
    """Name lines where they end, with a piece of each line; call this when the limits of the axes are set.

    Args:
        ends: of each line its last y, its name and its look.

    Returns:
        whether they could be named there without one covering another; if not, nothing is drawn.
    """
    from matplotlib.lines import Line2D

    gap = 1.35 * SMALL / (0.65 * 72 * axes.figure.get_figheight())  # of the axes' height, that are about so high
    if (len(ends) - 1) * gap > 1:
        return False
    (x, _), _ = axes.get_xlim(), axes.get_ylim()  # which settles both
    place = axes.transData + axes.transAxes.inverted()
    ordered = sorted(ends, key=lambda end: end[0])
    heights = _apart([float(place.transform((x, y))[1]) for y, _, _ in ordered], gap)
    for height, (_, name, look) in zip(heights, ordered, strict=True):
        piece = Line2D([1.015, 1.065], [height] * 2, transform=axes.transAxes, clip_on=False)
        piece.set(color=look.color, linestyle=look.linestyle, marker=look.marker, markevery=[1])
        axes.add_artist(piece)
        end = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(shortened(name), (1.065, height), xytext=(8, 0), fontsize=SMALL, **end)
    return True


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights moved as little as needed to be `gap` apart, the lowest and highest between 0 and 1."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + gap) if found else max(height, 0.0))
    most = 1.0
    for place in reversed(range(len(found))):
        found[place] = min(found[place], most)
        most = found[place] - gap
    return found


def shortened(name: str, most: int = 40) -> str:
    """A name of at most so many characters, all of which can be shown, without its middle if it is longer."""
    name = printable(name)
    if len(name) <= most:
        return name
    begin = (most - 3) // 2
    return f"{name[:begin]}...{name[-(most - 3 - begin) :]}"


@contextmanager
def in_place_of(name: str) -> Iterator[None]:
    """Give this look the name of one of matplotlib's style sheets, for libraries that choose that one by themselves."""
    from matplotlib import style

    library: dict[str, Any] = style.library
    theirs = library[name]
    library[name] = settings()
    try:
        yield
    finally:
        library[name] = theirs
