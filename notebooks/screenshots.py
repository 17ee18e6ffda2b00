"""Take the pictures of the walk-through again: MLflow's UI over the runs of one study, in a browser without a window.

python notebooks/screenshots.py --store sqlite:///mlflow.db --study my-sweep

It needs Chromium and its driver (Debian: chromium, chromium-driver), `pip install selenium`, and at least two finished
runs with PruneTrain in the study. It clicks what the text says to click, in MLflow 3.17; another version may call it
otherwise, and then the step that does not find its button is named.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from mlflow.tracking import MlflowClient
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

IMAGES = Path(__file__).with_name("images")
LIMIT = 150_000  # bytes a picture
PATIENCE = 30  # seconds for anything to appear
SETTINGS = ("optimizer.lr", "prune.lasso_ratio")
RESULTS = ("macs", "train_seconds", "val_accuracy")
COLUMNS = (*SETTINGS, *RESULTS)
CHARTS = "^(val_accuracy|macs|train_seconds)$"
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1400,900"),
)
# Class names and ids of what has neither a label nor a text.
EXPANDER = "button[data-component-id$='runnamecellrenderer.tsx_46']"
EYE = "[data-testid='experiment-view-runs-visibility-column-header']"
ASSISTANT = "[data-component-id='mlflow.assistant.chat_panel.close']"


class Page:
    """A browser window, in which things are found by what they say or are."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def find(self, what: str) -> WebElement:
        """The last thing to be seen that says just `what`, or that the XPath or CSS selector `what` describes."""
        if what.startswith("//"):
            by, query = By.XPATH, what
        elif "[" in what:
            by, query = By.CSS_SELECTOR, what
        else:
            by, query = By.XPATH, f"//*[normalize-space(text())='{what}']"
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(StaleElementReferenceException):  # the page has drawn it again meanwhile
                seen = [element for element in self.browser.find_elements(by, query) if element.is_displayed()]
                if seen:
                    return seen[-1]
            time.sleep(0.2)
        self.browser.save_screenshot("screenshots-failed.png")
        sys.exit(f"nothing on the page says or is {what!r}; see screenshots-failed.png")

    def click(self, *whats: str) -> None:
        """One after the other."""
        for what in whats:
            self.find(what).click()
            time.sleep(1.5)  # menus move while they open

    def write(self, field: str, text: str) -> None:
        """In place of what a field says."""
        self.find(field).click()
        self.find(field).send_keys(Keys.CONTROL + "a", Keys.NULL, text)
        time.sleep(1.5)

    def escape(self) -> None:
        webdriver.ActionChains(self.browser).send_keys(Keys.ESCAPE).perform()
        time.sleep(1)

    def open(self, address: str) -> None:
        self.browser.get(address)
        self.browser.refresh()  # addresses that differ only after the # are one page to the browser
        self.find("Run Name")
        time.sleep(4)
        for element in self.browser.find_elements(By.CSS_SELECTOR, ASSISTANT):
            element.click()
        self.browser.execute_script(
            "const s = document.createElement('style'); s.textContent = '.modebar {display: none !important}';"
            "document.head.append(s)"  # the charts' tools, which else cover what they show
        )

    def save(self, name: str, element: WebElement | None = None) -> None:
        """Keep the page, or an element of it, in at most 128 colours."""
        time.sleep(2)
        png = self.browser.get_screenshot_as_png() if element is None else element.screenshot_as_png
        picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
        path = IMAGES / f"{name}.png"
        picture.save(path, optimize=True)
        print(f"{path}: {picture.width}x{picture.height}, {path.stat().st_size} bytes")
        if path.stat().st_size > LIMIT:
            sys.exit(f"{path}: more than {LIMIT} bytes")


@contextlib.contextmanager
def ui(store: str) -> Iterator[str]:
    """The address of MLflow's UI over a store, started as `make ui` does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = ["ui", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen([sys.executable, "-m", "mlflow", *command])
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


@contextlib.contextmanager
def page() -> Iterator[Page]:
    """A browser with a profile of its own."""
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or sys.exit("chromium is not installed")
        for option in (*OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield Page(browser)
        finally:
            browser.quit()


def table(page: Page, address: str) -> None:
    """The runs of a study, below that of their sweep, and the columns that matter."""
    page.open(address)
    if page.browser.find_elements(By.CSS_SELECTOR, EXPANDER):
        page.click(EXPANDER)
    page.click("Columns")
    for column in ("Dataset", "Source", "Models", *COLUMNS):  # the first three are shown at first
        page.write("input[placeholder='Search columns']", column)
        page.click(f"//*[contains(@class, 'tree-title') and normalize-space(.)='{column}']")
    page.escape()
    page.save("mlflow-runs")


def parallel(page: Page, address: str) -> None:
    """A line a run, through its settings and results."""
    page.open(f"{address}&compareRunsMode=CHART")
    page.click(EYE, "Show all runs", "Add chart", "Parallel coordinates")
    for number, names in enumerate((SETTINGS, RESULTS)):
        field = page.browser.find_elements(By.CSS_SELECTOR, "[role='dialog'] input[type='search']")[number]
        for name in names:
            field.send_keys(name)
            page.click(f"[title='{name}']")
        page.click("Add new chart")  # the title: it closes the menu
    page.save("mlflow-parallel")


def metrics(page: Page, address: str) -> None:
    """Metrics over the epochs, mean and range of the runs that are alike."""
    page.open(f"{address}&compareRunsMode=CHART")
    page.click("Group by", "prune")
    page.write("input[placeholder='Search metric charts']", CHARTS)
    page.save("mlflow-metrics")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--store", default="sqlite:///mlflow.db", help="MLflow's tracking store")
    parser.add_argument("--study", required=True, help="value of the tag `study`")
    parser.add_argument("--experiment", default="morphtrain", help="name of MLflow's experiment")
    arguments = parser.parse_args()
    experiment = MlflowClient(arguments.store).get_experiment_by_name(arguments.experiment)
    if experiment is None:
        sys.exit(f"--experiment {arguments.experiment}: not in {arguments.store}")
    IMAGES.mkdir(exist_ok=True)
    with ui(arguments.store) as address, page() as window:
        query = quote(f'tags.study = "{arguments.study}"')
        runs = f"{address}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
        for picture in (table, parallel, metrics):
            picture(window, f"{runs}&searchFilter={query}")


if __name__ == "__main__":
    main()
