#!/usr/bin/env python
"""Make the screenshots of docs/studio.md from a folder with a finished run.

    fewstep distill demo --set preview.every=20
    python docs/screenshots.py runs/demo

Needs gradio, chromium and chromedriver. The screenshots go to docs/studio/; with --all every tab in both widths and
themes goes to that folder instead.
"""

import argparse
import io
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser import Browser, browsing  # noqa: E402

DESK, PHONE = (1280, 1400), (390, 844)
TABS = ("Runs", "New", "Sample", "Compare and vote", "Export")
TAB = (  # on a narrow screen the last ones are in a menu
    "([...document.querySelectorAll('button[role=tab]')].filter(e => e.checkVisibility({visibilityProperty: true}) && "
    "e.textContent.trim() === arguments[0])[0] ?? [...document.querySelectorAll('.overflow-dropdown button')]"
    ".filter(e => e.textContent.trim() === arguments[0])[0])"
)


@contextmanager
def studio(folder: Path) -> Iterator[str]:
    """Serve the studio of a folder; yield its address."""
    command = [sys.executable, "-m", "fewstep.cli.main", "studio", str(folder), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield next(line.strip() for line in server.stdout if line.startswith("http"))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def there(browser: Browser, selector: str) -> Callable[[], bool]:
    """Return whether something is in the page, as a question to ask again."""
    return lambda: bool(browser.run("return !!document.querySelector(arguments[0])", selector))


def open_tab(browser: Browser, name: str, run: str) -> None:
    """Open a tab, and what is worth seeing in it."""
    browser.until(lambda: bool(browser.run(f"return !!({TAB})", name)), 300)
    browser.run(f"{TAB}.click()", name)
    if name == "Runs":
        browser.until(there(browser, f"#runs input[value$='/{run}']"), 300)
        browser.run("document.querySelector(arguments[0]).click()", f"#runs input[value$='/{run}']")
        browser.until(lambda: run in browser.text("#about"), 300)
        browser.until(there(browser, "#wipe img"), 300)
        browser.until(there(browser, "#strips img"), 300)
    if name == "Sample":
        browser.until(lambda: "Serves" in browser.text("#about-student"), 300)
        if not browser.run("return !!document.querySelector('#times table')"):
            browser.run("document.querySelector('#go').click()")
            browser.until(lambda: "teacher" in browser.text("#times"), 600)
            browser.until(there(browser, "#sample-wipe img"), 300)
    time.sleep(3)  # for images and what moves


def taken(browser: Browser, path: Path, whole: bool) -> None:
    """Take a screenshot of what is in sight, or of the whole page, in few colours."""
    with tempfile.TemporaryDirectory() as folder:
        data = browser.screenshot(Path(folder) / "a.png", whole).read_bytes()
    with Image.open(io.BytesIO(data)) as found:
        found.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} KiB")


def main() -> None:
    """Take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--all", type=Path, help="take every tab in both widths and themes to this folder")
    parser.add_argument("--address", help="of a studio that is up and has the run; by default one is started")
    args = parser.parse_args()
    out = ROOT / "docs" / "studio"
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place) / "runs"
        shutil.copytree(args.run, runs / args.run.name)
        served = nullcontext(args.address) if args.address else studio(runs)
        with served as address, browsing(Path(place)) as browser:
            views = [(DESK, False), (PHONE, True)]
            if args.all is not None:
                out, views = args.all, [(size, dark) for size in (DESK, PHONE) for dark in (False, True)]
            out.mkdir(parents=True, exist_ok=True)
            for size, dark in views:
                browser.show(*size, dark=dark)
                browser.visit(address)
                if args.all is not None:
                    for name in TABS:
                        open_tab(browser, name, args.run.name)
                        theme = "dark" if dark else "light"
                        taken(browser, out / f"{name.split()[0].lower()}-{size[0]}-{theme}.png", True)
                elif size == DESK:
                    open_tab(browser, "Runs", args.run.name)
                    taken(browser, out / "runs.png", False)
                    open_tab(browser, "New", args.run.name)
                    taken(browser, out / "new.png", False)
                else:
                    open_tab(browser, "Runs", args.run.name)
                    browser.run("document.querySelector('#wipe').scrollIntoView({block: 'start'})")
                    time.sleep(2)
                    taken(browser, out / "phone.png", False)


if __name__ == "__main__":
    main()
