"""A person at the studio's page, what they train, and the studio itself."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from fewstep.backbones import miniature
from fewstep.backbones.unconditional import save_pixel_model
from tests import tiny
from tests.browser import Browser

CLASS = "<img src=x onerror=alert(1)> **cat**"  # a class, and so a prompt, with HTML and Markdown in it
PATIENCE = 600.0  # seconds, on a machine that others use
TAB = (
    "[...document.querySelectorAll('button[role=tab]')].filter(e => e.checkVisibility({visibilityProperty: true}) && "
    "e.textContent.trim() === arguments[0])[0]"
)


def recipe(folder: Path, iterations: int) -> Path:
    """A recipe that trains a tiny pixel teacher of random weights for a while."""
    teacher = folder / "pixels"
    save_pixel_model(teacher, tiny.pixels((CLASS, "sea lion")).pipe.unet, miniature.scheduler(), (CLASS, "sea lion"))
    (teacher / "prompts.txt").write_text(f"{CLASS}\nsea lion\n")
    value = {
        "kind": "distill",
        "name": "walk",
        "teacher": str(teacher),
        "method": {"name": "tdm-unify", "steps": [2, 1], "guidance": 1.5, "warmup": 1},
        "roles": {"rank": 2},
        "train": {"iterations": iterations, "batch": 2, "lr": 1.0e-4, "fake_lr": 1.0e-3, "checkpoint_every": 20},
        "preview": {"every": 100, "teacher_steps": 3, "prompts": [CLASS, "sea lion"]},
    }
    path = folder / "walk.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def serving(folder: Path, *options: str) -> Iterator[str]:
    """A studio of a folder, and its address."""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    server = subprocess.Popen(
        [sys.executable, "-m", "fewstep.cli.main", "studio", str(folder / "runs"), "--no-browser", *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if line.startswith("http://127.0.0.1:"):
                break
        else:
            raise AssertionError("".join(said))
        yield line.strip()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


class Walker:
    """A person at the page."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def tab(self, name: str) -> None:
        self.browser.until(lambda: bool(self.browser.run(f"return !!({TAB})", name)))
        self.browser.run(f"{TAB}.click()", name)

    def text(self, selector: str) -> str:
        found = self.browser.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        return str(found)

    def press(self, selector: str) -> None:
        """A press by keyboard, once the button may be pressed; a click misses what moves meanwhile."""
        self.browser.until(
            lambda: bool(self.browser.run("return document.querySelector(arguments[0])?.disabled === false", selector)),
            PATIENCE,
        )
        self.browser.run("document.querySelector(arguments[0]).focus()", selector)
        self.browser.press("Enter")

    def fill(self, block: str, text: str, *keys: str) -> None:
        """A text in the place of what a field holds."""
        field = f"{block} :is(input, textarea):not([type=file], [type=range])"
        self.has(field)
        self.browser.run("const e = document.querySelector(arguments[0]); e.focus(); e.select()", field)
        self.browser.press("Backspace", *text, *keys)

    def pick(self, block: str, text: str) -> None:
        """One more of the choices of a field that takes several, once the choice is there."""
        field, listed = f"{block} input", "return [...document.querySelectorAll('[role=option]')].map(e => e.innerText)"
        self.has(field)
        self.browser.run("document.querySelector(arguments[0]).focus()", field)
        self.browser.press(*text)  # Backspace in the empty field would take the last one out
        self.browser.until(lambda: any(text in choice for choice in self.browser.run(listed)), PATIENCE)
        self.browser.press("Enter")
        self.reads(block, text)

    def reads(self, selector: str, word: str, seconds: float = PATIENCE) -> None:
        """Wait until a part of the page says something."""
        try:
            self.browser.until(lambda: word in self.text(selector), seconds)
        except AssertionError as error:
            raise AssertionError(f"{selector} reads {self.text(selector)!r}, not {word!r}") from error

    def has(self, selector: str, seconds: float = PATIENCE) -> None:
        """Wait until something is on the page."""
        there = "return !!document.querySelector(arguments[0])"
        self.browser.until(lambda: bool(self.browser.run(there, selector)), seconds)

    def gone(self, selector: str, word: str) -> None:
        """Wait until a part of the page says something no more."""
        self.browser.until(lambda: word not in self.text(selector))

    def holds(self, block: str, text: str) -> None:
        """Wait until a field has a text."""
        value = "return document.querySelector(arguments[0])?.value ?? ''"
        field = f"{block} :is(input, textarea)"
        try:
            self.browser.until(lambda: self.browser.run(value, field) == text)
        except AssertionError as error:
            raise AssertionError(f"{block} has {self.browser.run(value, field)!r}, not {text!r}") from error

    def choose(self, run: str) -> None:
        """Open a run of the list."""
        own = (
            "return [...document.querySelectorAll('#runs input')].filter(e => e.value.endsWith('/' + arguments[0]))[0]"
        )
        self.browser.until(lambda: bool(self.browser.run(own, run)))
        self.browser.run(f"{own.removeprefix('return ')}.click()", run)

    def open(self, title: str) -> None:
        """Open a part of the page that is closed."""
        heads = (
            "[...document.querySelectorAll('button.label-wrap')]"
            ".filter(e => e.querySelector('span')?.innerText.trim() === arguments[0])[0]"
        )
        self.browser.until(lambda: bool(self.browser.run(f"return !!({heads})", title)))
        self.browser.run(f"const e = {heads}; if (!e.classList.contains('open')) e.click()", title)
