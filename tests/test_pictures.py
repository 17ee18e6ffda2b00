"""`make pictures` makes every picture that is shown, from stored records, in a browser that it tells what to do."""

from __future__ import annotations

import importlib
import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from documented import PAGES, ROOT
from mlflow.tracking import MlflowClient
from PIL import Image

from morphtrain.evidence.records import read_records

NOTEBOOKS = ROOT / "notebooks"


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(NOTEBOOKS))
    yield importlib.import_module("pictures")
    for name in ("pictures", "screenshots", "browser"):
        del sys.modules[name]


def test_every_picture_that_is_shown_is_made(pictures: ModuleType) -> None:
    shown = {
        (page.parent / path).resolve()
        for page in PAGES
        for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
        if "://" not in path
    }
    assert shown == {NOTEBOOKS / "images" / f"{name}.png" for name in pictures.NAMES}
    assert {path for path in (NOTEBOOKS / "images").iterdir() if path.suffix == ".png"} == shown, "or nobody sees it"
    assert re.search(
        r"^pictures: setup\n\t\$\(BIN\)/python notebooks/pictures\.py$", (ROOT / "Makefile").read_text(), re.M
    )


@pytest.mark.slow
def test_the_stored_search_is_in_the_store_as_it_was(
    pictures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0", "1"):
        shutil.copytree(pictures.RECORDS / name, tmp_path / "records" / name)
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    pictures.fill(store, tmp_path / "runs", tmp_path / "records")
    client = MlflowClient(store)
    found = client.search_runs([client.get_experiment_by_name("morphtrain").experiment_id])
    assert {run.info.status for run in found} == {"FINISHED"}
    assert len(found) == 3
    (parent,) = (run for run in found if "trial" not in run.data.tags)
    for run in (run for run in found if run is not parent):
        records = read_records(tmp_path / "records" / run.data.tags["trial"])
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["prune"] == ("none" if run.data.tags["trial"] == "0" else "prunetrain")
        assert run.data.params["epochs"] == "10"
        assert run.info.end_time == int(1000 * records[-1]["timestamp"]), "when it was, and not now"
        metrics = client.get_metric_history(run.info.run_id, "train_seconds")
        assert [metric.value for metric in metrics] == [record["train_seconds"] for record in records]


PAGE = """<!doctype html><body style="margin:0;height:3000px">
<button style="visibility:hidden" onclick="said('hidden')">Press</button>
<button style="position:absolute;top:10px;left:10px" onclick="said('first')">Press</button>
<button style="position:absolute;top:2000px;left:10px" onclick="said('last')">Press</button>
<input name="field" value="before" style="position:absolute;top:100px;left:10px" oninput="said(this.value)">
<p id="said" style="position:absolute;top:200px"></p>
<script>
  const said = (what) => document.getElementById('said').textContent += what + ';';
  addEventListener('keydown', (event) => { if (event.key === 'Escape') said('escape'); });
</script>"""


@pytest.mark.slow
def test_the_browser_clicks_and_writes_what_it_is_told(
    pictures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browsing = importlib.import_module("browser")
    if not any(map(shutil.which, browsing.NAMES)):
        pytest.skip("needs Chromium")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(browsing, "PATIENCE", 2)
    (tmp_path / "page.html").write_text(PAGE)
    with browsing.browser() as page:
        page.open((tmp_path / "page.html").as_uri())
        page.click("Press")
        page.click("//button[normalize-space(.)='Press']", number=0)
        page.write("input[name='field']", "after")
        page.escape()
        assert page.evaluate("document.getElementById('said').textContent") == "last;first;after;escape;"
        assert page.there("Press") and not page.there("Pull")
        picture = Image.open(io.BytesIO(page.picture()))
        assert picture.size == (browsing.SIZE["width"], browsing.SIZE["height"])
        with pytest.raises(SystemExit, match=r"nothing on the page says or is 'Pull'"):
            page.click("Pull")
        assert (tmp_path / "screenshots-failed.png").stat().st_size > 0
