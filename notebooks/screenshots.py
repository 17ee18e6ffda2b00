"""Take the pictures of the walk-through: MLflow's UI over the runs of one study, in a browser without a window.

python notebooks/screenshots.py --store sqlite:///mlflow.db --study my-sweep

It needs Chromium (Debian: chromium), and at least two finished runs of PruneTrain in the study. It clicks what the text
says to click, in MLflow 3.17; another version may call it otherwise, and then the step that does not find its button is
named. `make pictures` takes those of the documentation.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import quote

from browser import Browser, browser

IMAGES = Path(__file__).with_name("images")
LIMIT = 150_000  # bytes a picture
SETTINGS = ("optimizer.lr", "prune.lasso_ratio")
RESULTS = ("macs", "train_seconds", "val_accuracy")
COLUMNS = (*SETTINGS, *RESULTS)
CHARTS = "^(val_accuracy|macs|train_seconds)$"
# Class names and ids of what has neither a label nor a text.
EXPANDER = "button[data-component-id$='runnamecellrenderer.tsx_46']"
EYE = "[data-testid='experiment-view-runs-visibility-column-header']"
ASSISTANT = "[data-component-id='mlflow.assistant.chat_panel.close']"


def opened(page: Browser, address: str) -> None:
    """Go to a list of runs, put away what covers it, and show the runs below that of their sweep."""
    page.open(address)
    page.find("Run Name")
    time.sleep(4)
    if page.there(ASSISTANT):
        page.click(ASSISTANT)
    if page.there(EXPANDER):
        page.click(EXPANDER)
    page.evaluate(
        "const style = document.createElement('style'); style.textContent = '.modebar {display: none !important}';"
        "document.head.append(style)"  # the charts' tools, which else cover what they show
    )


def save(page: Browser, name: str) -> Path:
    """Keep what the page shows, in at most 128 colours."""
    from PIL import Image

    time.sleep(2)
    picture = Image.open(io.BytesIO(page.picture())).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    path = IMAGES / f"{name}.png"
    picture.save(path, optimize=True)
    print(f"{path}: {picture.width}x{picture.height}, {path.stat().st_size} bytes")
    if path.stat().st_size > LIMIT:
        sys.exit(f"{path}: more than {LIMIT} bytes")
    return path


@contextlib.contextmanager
def ui(store: str) -> Iterator[str]:
    """The address of MLflow's UI over a store, started as `make ui` does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = ["ui", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen([sys.executable, "-m", "mlflow", *command], env=quiet)
    try:
        for _ in range(120):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(address, timeout=5).close()
                break
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait()


def table(page: Browser, address: str) -> None:
    """The runs of a study, below that of their sweep, and the columns that matter."""
    opened(page, address)
    page.click("Columns")
    for column in ("Dataset", "Source", "Models", *COLUMNS):  # the first three are shown at first
        page.write("input[placeholder='Search columns']", column)
        page.click(f"//*[contains(@class, 'tree-title') and normalize-space(.)='{column}']")
    page.escape()
    save(page, "mlflow-runs")


def parallel(page: Browser, address: str) -> None:
    """A line a run, through its settings and results."""
    opened(page, f"{address}&compareRunsMode=CHART")
    page.click(EYE, "Show all runs", "Add chart", "Parallel coordinates")
    for number, names in enumerate((SETTINGS, RESULTS)):
        for name in names:
            page.write("[role='dialog'] input[type='search']", name, number)
            page.click(f"[title='{name}']")
        page.click("Add new chart")  # the title: it closes the menu
    save(page, "mlflow-parallel")


def metrics(page: Browser, address: str) -> None:
    """Metrics over the epochs, mean and range of the runs that are alike."""
    opened(page, f"{address}&compareRunsMode=CHART")
    page.click("Group by", "prune")
    page.write("input[placeholder='Search metric charts']", CHARTS)
    save(page, "mlflow-metrics")


# By the file that each leaves in `images`.
PICTURES = {"mlflow-runs": table, "mlflow-parallel": parallel, "mlflow-metrics": metrics}


def take(store: str, study: str, experiment: str = "morphtrain", names: Collection[str] = tuple(PICTURES)) -> None:
    """Pictures of a study in a store, by their names."""
    from mlflow.tracking import MlflowClient

    found = MlflowClient(store).get_experiment_by_name(experiment)
    if found is None:
        sys.exit(f"--experiment {experiment}: not in {store}")
    IMAGES.mkdir(exist_ok=True)
    query = quote(f'tags.study = "{study}"')
    with ui(store) as address:
        runs = f"{address}/#/experiments/{found.experiment_id}/runs?workflowType=machine_learning"
        for name in names:
            with browser() as page:  # a new one, since a page remembers what was opened
                PICTURES[name](page, f"{runs}&searchFilter={query}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--store", default="sqlite:///mlflow.db", help="MLflow's tracking store")
    parser.add_argument("--study", required=True, help="value of the tag `study`")
    parser.add_argument("--experiment", default="morphtrain", help="name of MLflow's experiment")
    arguments = parser.parse_args()
    take(arguments.store, arguments.study, arguments.experiment)


if __name__ == "__main__":
    main()
