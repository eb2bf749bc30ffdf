"""Every option that a message or a page names is one that a recipe takes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep.runs.recipe import RENAMED, DistillRecipe, FinetuneRecipe, annotations_of
from fewstep.zoo.pixel_teacher import PixelTeacherConfig
from fewstep.zoo.teacher import TeacherConfig

from .project import ROOT

SECTIONS = "method|train|roles|data|preview|warm_start|prompts"
OPTION = re.compile(rf"(?<![\w/.-])(?:{SECTIONS})(?:\.[a-z_0-9]+)+(?![\w(/])(?!\.\w)")
RECIPES = (DistillRecipe, FinetuneRecipe, TeacherConfig, PixelTeacherConfig)
SOURCES = sorted((ROOT / "src" / "fewstep").rglob("*.py"))
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "log.md"})


def messages(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that is no docstring."""
    tree = ast.parse(source)
    told = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.lineno, node.value


def known(option: str) -> bool:
    return any(any(annotations_of(recipe, option.split("."))) for recipe in RECIPES)


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_messages_name_options_that_there_are(file: Path) -> None:
    old = set(RENAMED) if file.name == "recipe.py" else set()
    odd = [
        f"line {line}: {option}"
        for line, text in messages(file.read_text(encoding="utf-8"))
        for option in OPTION.findall(text)
        if option not in old and not known(option) and not is_else(option)
    ]
    assert not odd


@pytest.mark.parametrize("page", PAGES, ids=lambda f: f.name)
def test_pages_name_options_that_there_are(page: Path) -> None:
    odd = [o for o in OPTION.findall(page.read_text(encoding="utf-8")) if not known(o) and not is_else(o)]
    assert not odd


def is_else(name: str) -> bool:
    """Whether a dotted name is a file, a key of a log, a module of the package, or something in a module."""
    parts = name.split(".")
    if parts[-1] in ("txt", "json", "yaml", "png") or name == "preview.distance":
        return True
    return any((ROOT / "src" / "fewstep" / "/".join(parts[:n])).with_suffix(".py").exists() for n in (2, 3))


def test_what_there_is_not_is_found() -> None:
    assert known("method.fake.updates") and known("train.lr") and known("warm_start.method.gan.weight")
    assert not known("method.fake_updates") and not known("train.nope") and not known("roles.lora.rank")
    assert OPTION.findall("lower train.lr, raise method.fake.updates.") == ["train.lr", "method.fake.updates"]
