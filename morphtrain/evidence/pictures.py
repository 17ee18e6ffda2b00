"""A picture of an analysis: what is drawn, and what it shows in words."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from morphtrain.evidence import style
from morphtrain.wording import printable


@dataclass(frozen=True)
class Picture:
    """What is drawn, and what it shows in words.

    `draw` gets empty axes of matplotlib. `size` is in inches.
    """

    title: str
    description: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = style.SIZE

    def svg(self) -> str:
        """The picture as a document of its own."""
        from matplotlib.text import Text

        with style.figure(self.size) as figure:
            self.draw(figure.subplots())
            for words in figure.findobj(Text):
                words.set_text(printable(words.get_text()))
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return text.getvalue()
