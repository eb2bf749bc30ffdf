"""The docs: generated parts are up to date, no number stands beside them, and every page is in the site."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.project import ROOT

NUMBERS = re.compile(r"\d[\d.,]*\s*%")
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "generate.py"))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page: Path, generator: dict[str, Any]) -> None:
    """`python docs/generate.py` writes them again."""
    text = page.read_text(encoding="utf-8")
    assert generator["made"](text) == text


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_no_percentage_stands_outside_what_is_computed(name: str, generator: dict[str, Any]) -> None:
    text = generator["PART"].sub("", (ROOT / name).read_text(encoding="utf-8"))
    assert NUMBERS.findall(text) == []


def test_every_part_is_in_a_page(generator: dict[str, Any]) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *PAGES))
    assert set(re.findall(r"<!-- begin ([\w-]+) -->", text)) == set(generator["PARTS"])


def test_every_setting_of_a_method_is_documented(generator: dict[str, Any]) -> None:
    """One line below each field, from which the recipe reference is made."""
    reference = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    empty = [line for line in reference.splitlines() if line.startswith("| `") and line.rstrip().endswith("|  |")]
    assert empty == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_page_is_in_the_site() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = {page for section in site["nav"] for entry in section.values() for page in _pages(entry)}
    assert listed == {page.name for page in PAGES} | {"ring.md"}


def _pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [
        page
        for part in entry
        for page in (_pages(part) if not isinstance(part, dict) else [p for v in part.values() for p in _pages(v)])
    ]
