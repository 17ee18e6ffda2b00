"""A network's widths over the epochs of a run in one picture: a band for each of its channel spaces."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from morphtrain.evidence import style
from morphtrain.evidence.style import INK, RULE, SERIES
from morphtrain.wording import counted, printable

Change = Mapping[str, Any]
Box = list[tuple[float, float]]  # its corners

WIDTH = 9.0  # inches
TALLEST, LOWEST = 0.34, 0.11  # inches a band: of few, and of many
FULL = 0.84  # of a band's height, for the most channels that it ever has
LINE = 0.17  # inches of a line of text
TOLD = 12  # events that are told below the picture
LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # a layer's number in a path


@dataclass(eq=False)
class Band:
    """A channel space through a run.

    Args:
        name: the last that it had.
        widths: (epoch after which, channels) at the start and wherever they changed; 0 from where it is gone.
    """

    name: str
    widths: list[tuple[int, int]] = field(default_factory=list)

    @property
    def first(self) -> int:
        """The channels that it began with."""
        return self.widths[0][1]

    @property
    def last(self) -> int:
        """The channels that are left at the end."""
        return self.widths[-1][1]

    @property
    def most(self) -> int:
        """The channels that it had at its widest."""
        return max(width for _, width in self.widths)

    def note(self, epoch: int, width: int) -> None:
        """Remember a width if it is another one."""
        if not self.widths or self.widths[-1][1] != width:
            self.widths.append((epoch, width))


def bands(changes: Sequence[Change]) -> list[Band]:
    """The channel spaces of a run in the network's order; those that come later stand where they are in the network.

    A space keeps its band under a new name: one that is recorded (`renamed`), or that it has since growing or gating
    wrapped its layer: `stages.0.conv` and then `stages.0.conv.1`.

    Args:
        changes: in order, each with `epoch`, `widths` by the names of channel spaces, and `renamed` if names changed:
            the new names of all spaces that are still there, by the old ones.
    """
    order: list[Band] = []
    current: dict[str, Band] = {}
    for change in changes:
        widths: Mapping[str, int] = change["widths"]
        renamed = change.get("renamed", {})
        before, current = current, {}
        for name, band in before.items():
            now = renamed.get(name) if renamed else name
            if now not in widths:
                now = _wrapped(name, [new for new in widths if new not in before])
            if now is None or now in current:  # gone, or one with another space
                band.note(change["epoch"], 0)
            else:
                current[now] = band
        place = 0
        for name, width in widths.items():
            if name not in current:
                current[name] = Band(name)
                order.insert(place, current[name])
            current[name].name = name
            current[name].note(change["epoch"], width)
            place = order.index(current[name]) + 1
    return order


def _wrapped(name: str, fresh: Sequence[str]) -> str | None:
    """Which of the fresh names is this one with a layer's number put in; None if none is."""
    for new in fresh:
        if any(new[: found.start() - 1] + new[found.end() :] == name for found in LAYER.finditer(new)):
            return new
    return None


def plot_widths(changes: Sequence[Change], epochs: int, path: Path, name: str = "") -> None:
    """Plot the width of every channel space over the epochs of one run, with the changes of structure, as a PNG.

    Args:
        changes: in order, each with `epoch`, `event` ("" for the start) and `widths`, as `bands` takes them.
        epochs: number of epochs that the run has trained.
        path: of the PNG.
        name: of the run, as the title says it: `resnet8 on digits`.
    """
    found = bands(changes)
    with style.figure(_size(found, _events(changes))) as figure:
        draw_widths(figure, changes, epochs, name)
        style.save(figure, path, _told(found, changes, epochs, name))


def draw_widths(figure: Any, changes: Sequence[Change], epochs: int, name: str = "") -> None:
    """What `plot_widths` writes, on an empty figure of any size."""
    found, events = bands(changes), _events(changes)
    _, height = _size(found, events)
    text = LINE * len(events)
    axes, below = figure.subplots(2, 1, height_ratios=(height - text, max(text, 1e-3)))
    style.headline(figure, title(found, epochs, name))
    end = epochs + max(0.5, 0.015 * epochs)  # the last network lasts until the picture ends
    _bars(axes, found, end)
    letters = min(style.SMALL, 0.8 * 72 * _band_height(found))
    axes.set_yticks(range(len(found)), [style.shortened(band.name) for band in found], fontsize=letters)
    for row, band in enumerate(found):
        width = f"{band.first}" if band.first == band.last == band.most else f"{band.first} to {band.last}"
        axes.annotate(width, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=letters)
    axes.set(xlim=(0, end), ylim=(max(len(found), 1) - 0.5, -0.5), xlabel="after epoch")
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    style.whole_epochs(axes)
    for spine in ("left", "bottom"):
        axes.spines[spine].set_visible(False)
    _marks(axes, changes)
    _legend(axes, found)
    below.set_axis_off()
    told = below.text(0, 1, "\n".join(events), fontsize=0.8 * style.SMALL, va="top", transform=below.transAxes)
    told.set_in_layout(False)  # however long an event is, it takes nothing from the bands


def title(found: Sequence[Band], epochs: int, name: str = "") -> str:
    """`resnet8 on digits: 9 channel spaces in 120 epochs, 232 to 96 channels`."""
    first = sum(band.first for band in found if band.widths[0][0] == 0)
    last = sum(band.last for band in found)
    before = f"{style.shortened(name, 60)}: " if name else ""
    return f"{before}{counted(len(found), 'channel space')} in {counted(epochs, 'epoch')}, {first} to {last} channels"


def _size(found: Sequence[Band], events: Sequence[str]) -> tuple[float, float]:
    """Inches of the picture."""
    return WIDTH, 1.5 + _band_height(found) * len(found) + LINE * len(events)


def _band_height(found: Sequence[Band]) -> float:
    """Inches, so that 200 bands are no more than two feet."""
    return max(LOWEST, min(TALLEST, 12.0 / max(len(found), 1)))


def _bars(axes: Any, found: Sequence[Band], end: float) -> None:
    """The channels of each space as the height of its band, over a track as high as those that it began with.

    What is above the first width has another colour.
    """
    from matplotlib.collections import PolyCollection

    track: list[Box] = []
    kept: list[Box] = []
    grown: list[Box] = []
    for row, band in enumerate(found):
        scale, base = FULL / band.most, row + FULL / 2
        track.append(_box(band.widths[0][0], end, base, base - scale * band.first))
        ends = [epoch for epoch, _ in band.widths[1:]] + [end]
        for (epoch, width), until in zip(band.widths, ends, strict=True):
            lower = min(width, band.first)
            kept.append(_box(epoch, until, base, base - scale * lower))
            if width > lower:
                grown.append(_box(epoch, until, base - scale * lower, base - scale * width))
    for boxes, colour in ((track, RULE), (kept, SERIES[0]), (grown, SERIES[1])):
        axes.add_collection(PolyCollection(boxes, facecolors=colour, linewidths=0))


def _box(left: float, right: float, bottom: float, top: float) -> Box:
    return [(left, bottom), (left, top), (right, top), (right, bottom)]


def _marks(axes: Any, changes: Sequence[Change]) -> None:
    """A stroke above the bands after each epoch that changed the network, with its number where there is room."""
    epochs = list(dict.fromkeys(change["epoch"] for change in changes if change["event"]))
    above = axes.get_xaxis_transform()
    if epochs:
        axes.plot(epochs, [1.0] * len(epochs), "|", color=INK, markersize=9, clip_on=False, transform=above)
    least = 0.04 * axes.get_xlim()[1]
    shown = -least
    for epoch in epochs:
        if epoch - shown >= least:
            place = {"xycoords": above, "xytext": (0, 6), "textcoords": "offset points"}
            axes.annotate(f"{epoch}", (epoch, 1.0), ha="center", va="bottom", fontsize=0.8 * style.SMALL, **place)
            shown = epoch


def _legend(axes: Any, found: Sequence[Band]) -> None:
    """What the colours are, below all else."""
    from matplotlib.patches import Patch

    parts = {"channels": SERIES[0], "more than at first": SERIES[1], "gone": RULE}
    kept, more, gone = (Patch(facecolor=colour, label=label) for label, colour in parts.items())
    handles = [kept, more, gone] if any(band.most > band.first for band in found) else [kept, gone]
    axes.figure.legend(handles=handles, loc="outside lower left", ncols=3)


def _events(changes: Sequence[Change]) -> list[str]:
    """What happened, a line each; of many the first, and how many more there are."""
    events = [f"epoch {change['epoch']}: {change['event']}" for change in changes if change["event"]]
    lines = [textwrap.shorten(printable(event), 130, placeholder=" ...") for event in events[:TOLD]]
    return [*lines, f"and {len(events) - TOLD} more, all in architecture/"] if len(events) > TOLD else lines


def _told(found: Sequence[Band], changes: Sequence[Change], epochs: int, name: str) -> str:
    """The picture for those who cannot see it."""
    of_each = "; ".join(f"{band.name} {band.first} to {band.last}" for band in found)
    return f"{title(found, epochs, name)}. Channels of each space: {of_each}. {' '.join(_events(changes))}"
