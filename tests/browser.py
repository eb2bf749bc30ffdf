"""A headless Chromium, spoken to by the W3C's WebDriver protocol: real clicks and real keys."""

import base64
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESK = (390, 844), (1280, 800)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of an element
KEYS = {
    "Left": "\ue012",
    "Right": "\ue014",
    "Down": "\ue015",
    "Enter": "\ue007",
    "Tab": "\ue004",
    "Backspace": "\ue003",
    "Control": "\ue009",
    "Escape": "\ue00c",
    "PageDown": "\ue00f",
}


def ask(method: str, address: str, value: dict[str, Any] | None = None) -> Any:
    """What the driver answers."""
    data = None if value is None else json.dumps(value).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:  # noqa: S310
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"].partition("\n")[0]) from error


class Browser:
    """One window of the browser."""

    def __init__(self, address: str, downloads: Path) -> None:
        self.address, self.downloads = address, downloads

    def _send(self, method: str, path: str, value: dict[str, Any] | None = None) -> Any:
        return ask(method, f"{self.address}/{path}".rstrip("/"), value)

    def devtools(self, command: str, **parameters: Any) -> Any:
        """One command of Chromium's own protocol."""
        return self._send("POST", "goog/cdp/execute", {"cmd": command, "params": parameters})

    def show(self, width: int, height: int, dark: bool = False) -> None:
        """A screen of this size, with fingers where it is a phone's."""
        phone = width < 600
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )
        self.devtools("Emulation.setTouchEmulationEnabled", enabled=phone, maxTouchPoints=5)
        self.devtools(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def open(self, page: Path) -> None:
        self.visit(page.resolve().as_uri())

    def visit(self, address: str) -> None:
        self._send("POST", "url", {"url": address})

    def upload(self, selector: str, path: Path) -> None:
        """Give a file to an `<input type=file>`, which need not be in sight."""
        found = self.run("return document.querySelector(arguments[0])", selector)
        self._send("POST", f"element/{found[ELEMENT]}/value", {"text": str(path.resolve())})

    def run(self, code: str, *arguments: Any) -> Any:
        """What JavaScript returns."""
        return self._send("POST", "execute/sync", {"script": code, "args": list(arguments)})

    def find(self, selector: str, text: str = "") -> str:
        """The one visible element of a CSS selector, with this text."""
        found = self.run(
            "const [selector, text] = arguments; return [...document.querySelectorAll(selector)].filter(e =>"
            " e.checkVisibility({visibilityProperty: true}) && (!text || e.textContent.trim() === text))",
            selector,
            text,
        )
        assert len(found) == 1, f"{selector} {text!r}: {len(found)} elements"
        return str(found[0][ELEMENT])

    def click(self, selector: str, text: str = "") -> None:
        """A click in the middle of an element, which has to be in sight and uncovered."""
        self._send("POST", f"element/{self.find(selector, text)}/click", {})

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent.trim()", selector))

    def type(self, selector: str, text: str) -> None:
        self._send("POST", f"element/{self.find(selector)}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Keys, one after the other, to whatever has the focus."""
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self._send("POST", "actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def chord(self, *keys: str) -> None:
        """Keys held together, to whatever has the focus."""
        held = [KEYS.get(key, key) for key in keys]
        actions = [{"type": "keyDown", "value": key} for key in held]
        actions += [{"type": "keyUp", "value": key} for key in reversed(held)]
        self._send("POST", "actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def tap(self, x: float, y: float, to: tuple[float, float] | None = None) -> None:
        """A finger on the screen, drawn to another place where there is one."""
        steps = [] if to is None else [{"type": "pointerMove", "duration": 80, "x": round(to[0]), "y": round(to[1])}]
        actions = [
            {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)},
            {"type": "pointerDown", "button": 0},
            *steps,
            {"type": "pointerUp", "button": 0},
        ]
        pointer = {"type": "pointer", "id": "finger", "parameters": {"pointerType": "touch"}, "actions": actions}
        self._send("POST", "actions", {"actions": [pointer]})

    def until(self, condition: Callable[[], bool], seconds: float = 90.0) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)

    def download(self, selector: str, path: Path) -> Path:
        """Click, and move the file that the page saves to `path`."""
        self.click(selector)
        self.until(lambda: bool(list(self.downloads.glob("*.json"))))
        return next(self.downloads.glob("*.json")).rename(path)

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """A screenshot, of the whole page or of what is in sight."""
        size = self.devtools("Page.getLayoutMetrics")["cssContentSize"] if whole else None
        clip = (
            {}
            if size is None
            else {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        )
        data = self.devtools("Page.captureScreenshot", captureBeyondViewport=whole, **clip)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    @property
    def overflow(self) -> int:
        """By how many pixels the page is wider than the screen."""
        return int(self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@contextmanager
def browsing(downloads: Path) -> Iterator[Browser]:
    """A browser without a window, whose downloads go to a folder; skips the test where there is none."""
    binary, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    server = subprocess.Popen(
        [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None
        line = next(line for line in server.stdout if "successfully on port" in line)
        address = f"http://127.0.0.1:{int(line.rpartition('port ')[2].strip().rstrip('.'))}/session"
        options = {
            "binary": binary,
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                     f"--user-data-dir={downloads / 'profile'}", "--window-size=1280,800"],
        }  # fmt: skip
        asked = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        session = ask("POST", address, asked)["sessionId"]
        browser = Browser(f"{address}/{session}", downloads)
        browser.devtools("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        try:
            yield browser
        finally:
            browser._send("DELETE", "")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # the browser too, whatever has become of the session
        server.wait(timeout=20)
