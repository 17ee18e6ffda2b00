"""A browser without a window: Chromium, told what to do by its DevTools protocol over two pipes.

It needs Chromium alone (Debian: chromium): no driver, no open port, no package.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = {"width": 1400, "height": 757}
PATIENCE = 30  # seconds for anything to appear
ANSWER = 60  # seconds for the browser to answer
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe", "--hide-scrollbars"),
)
# The elements that can be seen of those that an XPath or a CSS selector describes, or that say just this.
SEEN = """
function seen(what) {
  const path = what.startsWith("//") ? what : `//*[normalize-space(text())=${JSON.stringify(what)}]`;
  const isPath = what.startsWith("//") || !what.includes("[");
  const found = [];
  if (isPath) {
    const all = document.evaluate(path, document, null, XPathResult.ORDERED_NODE_SNAPSHOT_TYPE, null);
    for (let i = 0; i < all.snapshotLength; i++) found.push(all.snapshotItem(i));
  } else {
    found.push(...document.querySelectorAll(what));
  }
  return found.filter((e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden");
}
"""
CENTRE = """
(() => {
  %s
  const all = seen(%s), element = all.at(%s);
  if (!element) return null;
  const inside = (r) => r.top >= 0 && r.left >= 0 && r.bottom <= innerHeight && r.right <= innerWidth;
  if (!inside(element.getBoundingClientRect())) element.scrollIntoView({block: "center", inline: "nearest"});
  const box = element.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
})()
"""


class Browser:
    """A page, in which things are found by what they say or are."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self.process, self.to, self.back = process, to, back
        self.number, self.session, self.read = 0, "", b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Emulation.setDeviceMetricsOverride", **SIZE, deviceScaleFactor=1, mobile=False)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the protocol, and wait for its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self.number:
            pass  # it tells of events, too
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.read:
            ready, _, _ = select.select([self.back], [], [], ANSWER)
            more = os.read(self.back, 1 << 20) if ready else b""
            if not more:
                raise RuntimeError(f"Chromium does not answer; its exit code is {self.process.poll()}")
            self.read += more
        message, _, self.read = self.read.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, as plain data."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['text']}")
        return answer["result"].get("value")

    def open(self, address: str) -> None:
        """Load a page from scratch; addresses that differ only after the # are one page to the browser."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)

    def find(self, what: str, number: int = -1) -> list[float]:
        """The middle of the last thing to be seen (or of that `number`) that says just `what`, or that the XPath or CSS
        selector `what` describes; in pixels from the left and from the top."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):  # the page is being left
                if centre := self.evaluate(CENTRE % (SEEN, json.dumps(what), number)):
                    return list(centre)
            time.sleep(0.2)
        with open("screenshots-failed.png", "wb") as file:
            file.write(self.picture())
        sys.exit(f"nothing on the page says or is {what!r}; see screenshots-failed.png")

    def there(self, what: str) -> bool:
        """Whether something is to be seen that says or is this."""
        return bool(self.evaluate(f"(() => {{ {SEEN} return seen({json.dumps(what)}).length > 0; }})()"))

    def click(self, *whats: str, number: int = -1) -> None:
        """One after the other."""
        for what in whats:
            x, y = self.find(what, number)
            for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
                button = "none" if kind == "mouseMoved" else "left"
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)
            time.sleep(1.5)  # menus move while they open

    def write(self, field: str, text: str, number: int = -1) -> None:
        """In place of what a field says."""
        self.click(field, number=number)
        self.evaluate("document.activeElement.select?.()")
        self.call("Input.insertText", text=text)
        time.sleep(1.5)

    def escape(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Escape", code="Escape", windowsVirtualKeyCode=27)
        time.sleep(1)

    def picture(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own."""
    binary = next((found for name in NAMES if (found := shutil.which(name))), None)
    if binary is None:
        sys.exit("Chromium is not installed (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        its_in, to = os.pipe()
        back, its_out = os.pipe()
        # Chromium reads from 3 and writes to 4, which bash gives it.
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{its_in} 4>&{its_out}', binary, *OPTIONS]
        process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}"], pass_fds=(its_in, its_out), stderr=subprocess.DEVNULL
        )
        os.close(its_in)
        os.close(its_out)
        try:
            yield Browser(process, to, back)
        finally:
            process.terminate()
            process.wait()
            os.close(to)
            os.close(back)
