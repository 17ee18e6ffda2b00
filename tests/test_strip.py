"""A network's widths over the epochs: every space keeps its band, and a band is as high as the space is wide."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from matplotlib.colors import to_hex
from PIL import Image

import morphtrain
from morphtrain.errors import UserError
from morphtrain.evidence import style
from morphtrain.evidence.strip import FULL, bands, draw_widths, plot_widths
from morphtrain.trainer import checkpoint
from morphtrain.trainer.build import build_run

Change = dict[str, Any]


def change(epoch: int, event: str = "x", **widths: int) -> Change:
    return {"epoch": epoch, "event": event, "widths": widths}


def test_a_space_that_comes_later_stands_where_it_is_in_the_network() -> None:
    found = bands([change(0, "", a=8, d=4), change(2, a=4, b=2, c=6, d=4), change(3, c=6, d=1)])
    assert [band.name for band in found] == ["a", "b", "c", "d"]
    assert [band.widths for band in found] == [
        [(0, 8), (2, 4), (3, 0)],
        [(2, 2), (3, 0)],
        [(2, 6)],
        [(0, 4), (3, 1)],
    ]


@pytest.mark.parametrize("new", ["stages.0.conv.1", "stages.1.0.conv"])
def test_a_layer_that_was_wrapped_keeps_its_band(new: str) -> None:
    old = new.replace(".1", "")
    found = bands([change(0, "", **{old: 8, "z": 4}), change(1, **{new: 6, f"{new}9.extra": 6, "z": 4})])
    assert [(band.name, band.widths) for band in found] == [
        (new, [(0, 8), (1, 6)]),
        (f"{new}9.extra", [(1, 6)]),
        ("z", [(0, 4)]),
    ]


def test_a_recorded_name_is_followed_and_not_taken_for_the_space_that_had_it() -> None:
    """The first of three numbered spaces goes, so that the others are renumbered."""
    first, later = change(0, "", **{"x 1": 1, "x 2": 2, "x 3": 3}), change(1, **{"x 1": 2, "x 2": 3})
    later["renamed"] = {"x 2": "x 1", "x 3": "x 2"}
    found = bands([first, later])
    assert [(band.name, band.widths) for band in found] == [
        ("x 1", [(0, 1), (1, 0)]),
        ("x 1", [(0, 2)]),
        ("x 2", [(0, 3)]),
    ]


def test_spaces_that_became_one_share_a_band_from_then_on() -> None:
    later = change(1, a=3)
    later["renamed"] = {"a": "a", "b": "a"}
    first, second = bands([change(0, "", a=2, b=2), later])
    assert (first.widths, second.widths) == ([(0, 2), (1, 3)], [(0, 2), (1, 0)])


def history(spaces: int, epochs: int, seed: int) -> list[Change]:
    """Widths that fall and rise at random, of spaces that come and go."""
    chance = random.Random(seed)
    widths = {f"stages.{n}.conv": chance.randint(2, 64) for n in range(spaces)}
    changes = [change(0, "", **{name: width for n, (name, width) in enumerate(widths.items()) if n % 7})]
    for epoch in sorted(chance.sample(range(1, epochs + 1), min(epochs, 12))):
        widths = {name: max(1, width + chance.randint(-9, 4)) for name, width in widths.items()}
        widths = {name: width for name, width in widths.items() if chance.random() > 0.05}
        changes.append(change(epoch, f"pruned in epoch {epoch}", **widths))
    return changes


def heights(axes: Any, epoch: float) -> dict[tuple[str, int], float]:
    """By colour and row, how high the boxes are there."""
    found: dict[tuple[str, int], float] = {}
    for collection in axes.collections:
        for colour in map(to_hex, collection.get_facecolor()):
            for box in collection.get_paths():
                left, bottom = box.vertices.min(0)
                right, top = box.vertices.max(0)
                if left <= epoch < right:
                    row = round((bottom + top) / 2)
                    found[colour, row] = found.get((colour, row), 0.0) + top - bottom
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_band_is_as_high_as_its_space_is_wide(seed: int) -> None:
    changes = history(12, 30, seed)
    names = [band.name for band in bands(changes)]
    seen: dict[str, list[int]] = {name: [c["widths"].get(name, 0) for c in changes] for name in names}
    first = {name: next(width for width in widths if width) for name, widths in seen.items()}
    with style.figure((9, 8)) as figure:
        draw_widths(figure, changes, 30)
        for epoch in range(31):
            now = [c["widths"] for c in changes if c["epoch"] <= epoch][-1]
            drawn = heights(figure.axes[0], epoch + 0.25)
            for row, name in enumerate(names):
                kept, grown = (drawn.get((colour, row), 0.0) for colour in style.SERIES[:2])
                scale = FULL / max(seen[name])
                assert kept == pytest.approx(scale * min(now.get(name, 0), first[name]))
                assert grown == pytest.approx(scale * max(now.get(name, 0) - first[name], 0))


@pytest.mark.parametrize(("spaces", "epochs"), [(1, 1), (8, 120), (50, 300), (200, 60)])
def test_names_do_not_cover_one_another(spaces: int, epochs: int, tmp_path: Path) -> None:
    changes = history(spaces, epochs, 0)
    plot_widths(changes, epochs, tmp_path / "widths.png", "resnet8 on digits")
    with Image.open(tmp_path / "widths.png") as picture:
        width, height = (pixels / style.DOTS for pixels in picture.size)
        said = picture.text["Description"]
    assert f"in {epochs} epoch" in said and "pruned in epoch" in said
    with style.figure((width, height)) as figure:
        draw_widths(figure, changes, epochs, "resnet8 on digits")
        figure.draw_without_rendering()
        axes = figure.axes[0]
        labels = [label.get_window_extent() for label in axes.get_yticklabels()]
        ends = [text.get_window_extent() for text in axes.texts if text.xy[0] == 1.01]
        marks = [text.get_window_extent() for text in axes.texts if text.xy[0] != 1.01]
        assert len(labels) == len(ends) == len(bands(changes))
        for boxes in (labels, ends):
            assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(boxes))
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(marks))
        assert min(box.x0 for box in labels) >= 0 and max(box.x1 for box in ends) <= figure.bbox.x1
        assert axes.get_window_extent().width > 0.4 * figure.bbox.width


def test_a_run_notes_names_that_changed() -> None:
    run = build_run(morphtrain.compose(*SMALL))
    run.note("as they were", {"a": "a", "b": "b"})
    run.note("renumbered", {"b": "a", "c": "c"})
    assert "renamed" not in run.changes[-2]
    assert run.changes[-1]["renamed"] == {"b": "a", "c": "c"}


def test_names_of_the_wrong_kind_make_no_checkpoint(tmp_path: Path) -> None:
    run = build_run(morphtrain.compose(*SMALL))
    run.changes[0]["renamed"] = {"a": 1}
    checkpoint.save(run, tmp_path, None)
    with pytest.raises(UserError, match="a change's renamed"):
        checkpoint.Checkpoint(tmp_path / "last.pt").check_run()
