"""The look of all pictures: kept in one place, told apart by everybody, readable for runs of any length."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from morphtrain.evidence import drawing, plots, style
from morphtrain.evidence.repeats import Estimate
from morphtrain.evidence.words import compact
from morphtrain.report.build import HERE
from morphtrain.report.svg import palette

ROOT = Path(__file__).resolve().parents[1]
ONE_PLACE = ROOT / "morphtrain" / "evidence" / "style.py"

# Severity 1 of each kind, for linear RGB (Machado, Oliveira and Fernandes 2009, table 1).
VISIONS = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


# -- one place -------------------------------------------------------------------------------------------------------


def sources() -> Iterator[tuple[str, ast.AST]]:
    """All code that may draw: by its file, the notebooks' cells too."""
    for path in sorted((ROOT / "morphtrain").rglob("*.py")):
        if path != ONE_PLACE:
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                yield path.name, ast.parse("".join(cell["source"]))


def colours_in(node: ast.AST) -> Iterator[str]:
    """Where a colour, a map of colours or a setting of matplotlib is written out."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            if re.fullmatch(r"#[0-9a-fA-F]{6}|C\d|tab:\w+", part.value):
                yield f"line {part.lineno}: {part.value}"
        elif isinstance(part, ast.keyword) and part.arg and (part.arg == "c" or re.search("color|cmap", part.arg)):
            constants = (one for one in ast.walk(part.value) if isinstance(one, ast.Constant))
            yield from (
                f"line {one.lineno}: {part.arg}={one.value}"
                for one in constants
                if isinstance(one.value, str) and one.value not in ("none", ".")
            )
        name = getattr(part, "attr", getattr(part, "id", getattr(part, "name", "")))
        if name in ("rcParams", "rc_context", "mplstyle"):
            yield f"line {part.lineno}: {name}"


def test_colours_and_settings_are_written_in_one_place() -> None:
    found = [f"{name}, {where}" for name, tree in sources() for where in colours_in(tree)]
    assert found == []


@pytest.mark.parametrize(
    "code",
    ["x = '#20508f'", "plot(color='black')", "set(facecolor=('red' if x else 'C0'))", "matplotlib.rcParams['a']"],
)
def test_a_colour_that_is_written_elsewhere_is_found(code: str) -> None:
    assert list(colours_in(ast.parse(code)))


# -- colours ---------------------------------------------------------------------------------------------------------


def linear(colour: str) -> np.ndarray:
    """Linear RGB of #rrggbb (IEC 61966-2-1)."""
    values = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB, D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratios = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(ratios > (6 / 29) ** 3, np.cbrt(ratios), ratios / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    """As WCAG 2 has it."""
    lower, higher = sorted(linear(colour) @ np.array([0.2126, 0.7152, 0.0722]) + 0.05 for colour in (one, other))
    return float(higher / lower)


@pytest.mark.parametrize("theme", [style.LIGHT, style.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("vision", VISIONS)
def test_no_two_series_look_alike(theme: style.Theme, vision: str) -> None:
    """12 is five times what one just tells apart."""
    seen = [lab(np.array(VISIONS[vision]) @ linear(colour)) for colour in theme.series]
    distances = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in itertools.combinations(range(6), 2)}
    assert min(distances.values()) >= 12, distances


@pytest.mark.parametrize("theme", [style.LIGHT, style.DARK], ids=["light", "dark"])
def test_what_is_drawn_stands_out_from_the_paper(theme: style.Theme) -> None:
    assert contrast(theme.ink, theme.paper) >= 7
    assert min(contrast(colour, theme.paper) for colour in theme.series) >= 3


def test_series_differ_in_more_than_colour() -> None:
    looks = list(style.looks("abcdef").values())
    for one, other in itertools.combinations(looks, 2):
        assert one.marker != other.marker and one.linestyle != other.linestyle and one.color != other.color


def test_every_colour_of_the_page_is_defined_light_and_dark() -> None:
    css = palette() + (HERE / "style.css").read_text()
    blocks = css.split("@media")
    light, dark, on_paper = blocks[0], blocks[1], blocks[2]
    used = {*re.findall(r"var\((--[\w-]+)\)", css), "--ink", "--rule", "--paper", *(f"--series-{n}" for n in range(6))}
    for name in used - {"--quiet", "--tint", "--link"}:
        assert all(f"{name}: #" in block for block in (light, dark, on_paper)), name
    for colour in (*style.DARK.series, style.DARK.ink):
        assert colour in dark and colour not in light + on_paper


# -- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(9, "9"), (999, "999"), (999.6, "1k"), (297_482, "297k"), (999_600, "1M"), (1_234_567, "1.23M"), (2.5e9, "2.5G")],
)
def test_sizes_at_a_glance(value: float, text: str) -> None:
    assert compact(value) == text


def test_long_names_lose_their_middle() -> None:
    name = "prune=prunetrain prune.lasso_ratio=8 optimizer.lr=0.123456789"
    assert style.shortened("short") == "short"
    assert len(style.shortened(name)) == 40
    assert style.shortened(name).startswith(name[:15]) and style.shortened(name).endswith(name[-15:])


def drawn_axes(values: Sequence[float]) -> Any:
    with style.figure() as figure:
        axes = figure.subplots()
        drawing.boxes(axes, {"one": values, "other": values}, "arm", "test accuracy")
        return axes


def test_an_axis_that_does_not_begin_at_0_says_so() -> None:
    assert drawn_axes([0.0, 0.5, 1.0]).get_ylabel() == "test accuracy"
    axes = drawn_axes([0.90, 0.92, 0.95])
    low, _ = axes.get_ylim()
    assert low > 0.8
    assert axes.get_ylabel() == f"test accuracy\n(axis begins at {low:.3g})"


# -- where lines end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[0.5] * 6, [1.0, 1.0, 1.0], [0.0, 0.001, 1.0], [0.1, 0.9]])
def test_names_of_lines_do_not_cover_one_another(ends: list[float]) -> None:
    with style.figure() as figure:
        axes = figure.subplots()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        looks = style.looks(f"line {n}" for n in range(len(ends)))
        assert style.label_ends(axes, [(y, name, look) for y, (name, look) in zip(ends, looks.items(), strict=True)])
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        assert all(box.x1 <= figure.bbox.x1 for box in boxes)
        heights = {text.get_text(): text.xy[1] for text in axes.texts}
        assert all(
            heights[f"line {i}"] < heights[f"line {j}"]
            for i, j in itertools.permutations(range(len(ends)), 2)
            if ends[i] < ends[j]
        )


def test_many_lines_are_named_in_a_legend_instead() -> None:
    arms = {f"arm {n}": [(float(e), Estimate((n,), n, None, None)) for e in (1, 2)] for n in range(40)}
    with style.figure() as figure:
        axes = figure.subplots()
        drawing.curves(axes, arms, "loss")
        assert len(axes.get_legend().get_texts()) == 40 and not axes.texts


# -- a run -----------------------------------------------------------------------------------------------------------


INITIAL = {"params": 297_000, "macs": 1_000_000}
NAME = "r\N{LATIN SMALL LETTER E WITH ACUTE}seau \N{GREEK SMALL LETTER ALPHA}"


def history(epochs: int) -> list[dict[str, float]]:
    """A run that is pruned after the first epoch, with a warm-up epoch, a disturbed and a profiled one."""
    return [
        {
            "epoch": epoch,
            "val_accuracy": 1 - 0.9 / epoch,
            "epoch_seconds": 1.0 + (epoch == 1),
            "contended": float(epoch == 3),
            "warmup": float(epoch == 1),
            "profiled": float(epoch == 4),
            "changed": float(epoch == 1),
            "params": 10_000,
            "macs": 100_000,
            "channel_density": 0.25,
        }
        for epoch in range(1, epochs + 1)
    ]


@pytest.mark.parametrize("name", ["resnet8 on digits", f"{'my_package.networks.' * 9}Net on my_package.pictures"])
@pytest.mark.parametrize("epochs", [1, 2, 120, 300])
def test_a_run_of_any_length_is_readable(epochs: int, name: str) -> None:
    with style.figure(plots.RUN_SIZE) as figure:
        plots.draw_run(figure, history(epochs), INITIAL, name)
        figure.draw_without_rendering()
        texts = [figure._suptitle, *(axes.title for axes in figure.axes), *(axes._left_title for axes in figure.axes)]
        texts += [text for axes in figure.axes for text in axes.texts]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
        for axes in figure.axes:
            assert axes.get_xlabel() and axes.get_ylabel()
            assert all(tick == int(tick) for tick in axes.get_xticks())
        assert figure.axes[0].get_ylim()[0] <= 0 and figure.axes[1].get_ylim()[0] == 0
        _, seconds, _ = figure.axes
        kinds = {line.get_label(): list(line.get_xdata()) for line in seconds.lines}
        assert kinds["warm-up"] == [1]
        assert kinds["contended"] == ([3] if epochs >= 3 else [])
        assert kinds["profiled"] == ([4] if epochs >= 4 else [])


def test_the_title_says_what_came_of_it() -> None:
    found = history(120)
    assert plots.title(found, INITIAL, "resnet8 on digits") == "resnet8 on digits: 297k to 10k parameters in 120 epochs"
    found[-1] |= {"params": 297_000, "test_accuracy": 0.9694}
    assert plots.title(found[-1:], INITIAL) == "297k parameters in 120 epochs, test accuracy 0.969"


def test_one_long_epoch_does_not_flatten_the_others() -> None:
    found = history(10)
    found[0]["epoch_seconds"] = 50.0
    with style.figure(plots.RUN_SIZE) as figure:
        plots.draw_run(figure, found, INITIAL)
        _, seconds, _ = figure.axes
        assert seconds.get_ylim()[1] < 3
        drawn = {line.get_label(): list(line.get_xdata()) for line in seconds.lines}
        assert drawn["longer, up to 50 s"] == [1] and drawn["warm-up"] == []
        assert "longer, up to 50 s" in [text.get_text() for text in seconds.get_legend().get_texts()]


def test_a_picture_says_in_words_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    plots.plot_run(
        history(120), INITIAL, path, "r\N{LATIN SMALL LETTER E WITH ACUTE}seau \N{GREEK SMALL LETTER ALPHA}\x00"
    )
    with Image.open(path) as picture:
        said = picture.text["Description"]
    assert said.startswith(
        "r\N{LATIN SMALL LETTER E WITH ACUTE}seau \N{GREEK SMALL LETTER ALPHA}\ufffd: 297k to 10k parameters"
    )
    assert "0.9925 at the end" in said and "1 of them contended" in said and "0.100 of the MACs" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run.png"]


def test_losses_that_are_cut_off_are_counted() -> None:
    steps = [
        (10.0 ** (n / 10 - 5), 2.0 - n / 20 if n < 30 else 9.0, 2.0 - n / 20 if n < 30 else 1.0) for n in range(40)
    ]
    with style.figure() as figure:
        plots.draw_learning_rates(figure, steps, 0.001)
        (axes,) = figure.axes
        assert "10 of 40 batches lie above the axis" in axes.get_ylabel()
        assert "0.001 is suggested" in axes._left_title.get_text()
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert any(name.startswith("lowest, at") for name in names)
