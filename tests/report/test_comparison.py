"""The page of a comparison: any two images under one slider, by keys and by finger; nothing is loaded."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.report.comparison import Comparison, comparison_markdown, comparison_page
from fewstep.report.page import small_url
from tests.browser import DESK, PHONE, Browser, browsing

HOSTILE = "<script>document.title='broken'</script> | {{ 7 * 7 }}"
NAMES = ("a, 4 steps", HOSTILE, "teacher x, 50 guided steps")


def row(name: str, **numbers: Any) -> dict[str, Any]:
    return {"model": name, "nfe": 4, "seconds_per_image": 0.5, "brightness": 0.5} | numbers


def compared(**other: Any) -> Comparison:
    rng = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 3, 16, 16, generator=rng) for _ in NAMES]
    rows = [row(NAMES[0], to_teacher=0.25), row(NAMES[1], to_teacher=0.5), row(NAMES[2], seconds_per_image=0.125)]
    return Comparison(
        ("red cat", HOSTILE, ""), rows, images, [(NAMES[0], NAMES[1], 0.125)], ("Said <b>first</b>.",), **other
    )


def test_the_table_is_markdown_of_plain_text() -> None:
    text = comparison_markdown(compared())
    assert "| a, 4 steps | 4 | 0.500 s | 0.250 (best) | 0.500 |".replace("0.500 s", "0.500\xa0s") in text
    assert "<script>" not in text.replace("\\<script", "") and "0.125" in text and "Said \\<b\\>" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:5]} == {6}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as found:
        yield found


def test_two_images_are_wiped_by_keys_and_by_finger(browser: Browser, tmp_path: Path) -> None:
    whole = compared()
    html = comparison_page(whole)
    assert not re.search(r"https?:|@import|url\(", html) and "<script>document" not in html and "<b>first" not in html
    page = tmp_path / "comparison.html"
    page.write_text(html, encoding="utf-8")
    browser.show(*DESK)
    browser.open(page)
    assert browser.run("return document.title") == " · ".join(NAMES)

    def stage() -> list[str]:
        return list(browser.run("return [...document.querySelectorAll('.stage img')].map(i => i.src)"))

    def at() -> float:
        return float(browser.run("return document.querySelector('.stage').style.getPropertyValue('--at')").rstrip("%"))

    assert stage() == [small_url(whole.images[2][0]), small_url(whole.images[0][0])] and at() == 50
    browser.click(".stage input")
    browser.press("Right", "Right")
    assert at() > 50
    browser.press("PageDown")
    assert stage() == [small_url(whole.images[2][1]), small_url(whole.images[0][1])]
    assert browser.text("#prompt") == HOSTILE and browser.text("#count") == "2 of 3"
    browser.click("button", "Next →")
    browser.click("button", "Next →")
    assert browser.text("#count") == "1 of 3"
    browser.run("const s = document.getElementById('left'); s.value = 1; s.dispatchEvent(new Event('change'))")
    assert stage()[0] == small_url(whole.images[1][0])
    assert browser.run("return [...document.querySelectorAll('.every figcaption')].map(c => c.textContent)") == list(
        NAMES
    )
    browser.show(*PHONE)
    browser.open(page)
    assert browser.overflow == 0
    box = browser.run(
        "const r = document.querySelector('.stage').getBoundingClientRect(); return [r.x, r.y, r.width, r.height]"
    )
    middle = box[1] + box[3] / 2
    browser.tap(box[0] + box[2] / 2, middle, to=(box[0] + box[2] * 0.2, middle))
    assert at() == pytest.approx(20, abs=3)
