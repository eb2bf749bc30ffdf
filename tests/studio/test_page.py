"""A whole small distillation in a browser: start, watch, stop, resume, sample, compare, vote, export."""

import json
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from fewstep.studio.images import settings_in
from tests.browser import DESK, PHONE, browsing
from tests.studio.walker import CLASS, Walker, recipe, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio: pip install 'fewstep[studio]'"),
]
ITERATIONS = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studio")


@pytest.fixture(scope="module")
def walker(folder: Path) -> Iterator[Walker]:
    (folder / "browser").mkdir()
    with browsing(folder / "browser") as browser:
        for address in serving(folder):
            browser.show(*DESK)
            browser.visit(address)
            yield Walker(browser)


def test_a_whole_distillation(walker: Walker, folder: Path) -> None:
    runs = folder / "runs"
    begin(walker, folder)
    watch(walker)
    stop_and_resume(walker)
    sample(walker)
    vote(walker, runs)
    export(walker, runs)
    assert walker.browser.run("return document.querySelectorAll('img[src=x]').length") == 0
    narrow_and_dark(walker)


def begin(walker: Walker, folder: Path) -> None:
    """Look at a recipe of one's own, and start it."""
    walker.reads("#queue", "No run yet")
    walker.tab("New")
    walker.fill("#recipe", str(recipe(folder, ITERATIONS)), "Enter")
    walker.reads("#about-recipe", "says nothing of itself")
    value = "return document.querySelector('#set-train-iterations input, #set-train-iterations textarea').value"
    walker.browser.until(lambda: walker.browser.run(value) == str(ITERATIONS))
    walker.fill("#name", "walk:b", "Tab")
    walker.press("#start")
    walker.reads("#said", "choose another")  # no folder may be called so
    walker.fill("#name", "walk", "Tab")
    walker.fill("#more", "train.ema=0.9", "Tab")
    walker.press("#start")
    walker.reads("#about", "walk")


def watch(walker: Walker) -> None:
    """See it train without a reload."""
    for word in ("training", f"of {ITERATIONS}"):
        walker.reads("#about", word)
    walker.has("#strips img")
    walker.reads("#strips", "**cat**")
    assert "<img src=x onerror=alert(1)> **cat**" in walker.text("#strips")
    walker.reads("#when", "iteration")
    walker.tab("Curves")
    walker.has("#curves svg")
    walker.tab("Log")
    walker.reads("#log", "before the training")


def stop_and_resume(walker: Walker) -> None:
    """Stop it, and go on to its end."""
    walker.press("#stop")
    walker.reads("#done", "checkpoint")
    walker.reads("#about", "Stopped at")
    walker.press("#resume")
    walker.reads("#done", "last checkpoint")
    walker.reads("#about", "training")
    walker.reads("#about", "finished")
    walker.reads("#log", "resuming")
    walker.press("#report")
    walker.reads("#done", "report.html")


def sample(walker: Walker) -> None:
    """Sample beside the teacher, and take the settings of an image."""
    walker.tab("Sample")
    walker.reads("#about-student", "2 steps, 1 step")
    walker.fill("#seed", "5", "Tab")
    walker.press("#go")
    walker.reads("#times", "teacher, 50 steps")
    walker.has("#sample-wipe img")
    walker.press("#download")
    walker.browser.until(lambda: bool(list(walker.browser.downloads.glob("*.png"))))
    (image,) = walker.browser.downloads.glob("*.png")
    told = settings_in(image)
    assert (told.prompt, told.seed, told.steps) == (CLASS, 5, 2)
    with Image.open(image) as found:
        assert found.size == (8, 8)
    walker.fill("#seed", "9", "Tab")
    walker.browser.upload("#dropped input[type=file]", image)
    seed = "return document.querySelector('#seed input').value"
    walker.browser.until(lambda: walker.browser.run(seed) == "5")
    walker.press("#steps-grid")
    walker.has("#grid img")


def vote(walker: Walker, runs: Path) -> None:
    """Vote blind, and count."""
    walker.tab("Compare and vote")
    walker.pick("#students", "walk, 2")
    walker.fill("#compare-prompts", "2", "Tab")
    walker.fill("#compare-name", "blind", "Tab")
    walker.press("#study-go")
    walker.has("#vote iframe")
    walker.press("#count-votes")
    walker.reads("#counted", "no vote yet")
    inside = "const d = document.querySelector('#vote iframe').contentDocument;"
    walker.browser.until(lambda: bool(walker.browser.run(f"{inside} return !!d?.querySelector('form button')")))
    walker.browser.run(f"{inside} d.querySelector('form button').click()")
    for _ in range(2 * 2):  # two pairs, two questions
        walker.browser.until(lambda: bool(walker.browser.run(f"{inside} return !d.querySelector('.pair.waiting')")))
        time.sleep(0.5)  # in which the page takes no answer
        walker.browser.run(f"{inside} d.querySelector('.choices.now button').click()")
    walker.browser.until(lambda: bool(walker.browser.run(f"{inside} return !d.getElementById('done').hidden")))
    walker.press("#count-votes")
    walker.reads("#counted", "Win rate of A")
    assert "Which image is better?" in walker.text("#counted")
    (answers,) = (runs / "studies" / "blind").glob("answers-*.json")
    assert len(json.loads(answers.read_text())["answers"]) == 2


def export(walker: Walker, runs: Path) -> None:
    """Write the student, checked, and see how to use it."""
    walker.tab("Export")
    walker.has("#export-student")
    out = str(runs / "exports" / "walk-student")
    value = "return document.querySelector('#export-folder input, #export-folder textarea').value"
    walker.browser.until(lambda: walker.browser.run(value) == out)
    walker.press("#export-go")
    walker.reads("#export-said", "largest difference of a pixel")
    walker.reads("#export-files", "fewstep.json")
    walker.reads("#snippet", "import")
    assert (Path(out) / "fewstep.json").is_file()


def narrow_and_dark(walker: Walker) -> None:
    """No tab is wider than a phone, and every one is reached by keyboard."""
    for name in ("New", "Sample", "Compare and vote", "Export", "Runs"):
        walker.browser.show(*DESK)
        walker.tab(name)
        assert walker.browser.overflow <= 0, name
        walker.browser.show(*PHONE, dark=True)
        assert walker.browser.overflow <= 0, name
    walker.browser.show(*DESK)
    walker.tab("Images")  # an earlier step has left another one open
    walker.browser.run("document.querySelector('#tabs button[role=tab]').focus()")
    walker.browser.press("Enter")
    seen = set()
    for _ in range(30):
        walker.browser.press("Tab")
        seen.add(walker.browser.run("const e = document.activeElement; return e.id || e.closest('[id]')?.id || ''"))
    assert {"runs", "preview"} <= seen, seen
