"""The style that the report's pictures share: told apart by marker and line as well as by colour."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from morphtrain.wording import printable

# Dark on white paper; a page replaces each by a variable of its own, so that it suits a dark one as well.
INK, RULE, PAPER = "#1b1b1d", "#c8c8cc", "#fefefd"
SERIES = ("#20508f", "#b5460f", "#2f7d4f", "#7a3f9d", "#8a6a00", "#0d7d8c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
STYLE = {
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{"axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK, "legend.labelcolor": INK},
    **{"axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none"},
    **{"axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
    **{"font.size": 11.0, "lines.linewidth": 1.8, "lines.markersize": 6.0, "text.parse_math": False},
    "svg.fonttype": "none",  # text stays text: it is searched, read aloud, and takes the page's font
    "svg.hashsalt": "morphtrain",  # the same ids every time
}


@dataclass(frozen=True)
class Picture:
    """What is drawn, and what it shows in words.

    `draw` gets empty axes of matplotlib. `size` is in inches.
    """

    title: str
    description: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (7.0, 4.0)

    def svg(self) -> str:
        """The picture as a document of its own."""
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.text import Text

        with rc_context(STYLE):
            figure = Figure(figsize=self.size, layout="constrained")
            FigureCanvasSVG(figure)
            self.draw(figure.subplots())
            for words in figure.findobj(Text):
                words.set_text(printable(words.get_text()))
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return text.getvalue()


@dataclass(frozen=True)
class Look:
    """How an arm is drawn."""

    color: str
    marker: str
    linestyle: Any


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, in order: the first six differ in colour, marker and line."""
    looks = zip(cycle(SERIES), cycle(MARKERS), cycle(LINES), strict=False)
    return {name: Look(*look) for name, look in zip(names, looks, strict=False)}
