"""Loading a benchmark as `python benchmarks/NAME.py` does: with the modules next to it."""

import runpy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ..project import ROOT

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Yield a function that loads a benchmark's names; the modules next to it are forgotten after the test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))
    for file in FOLDER.glob("*.py"):
        sys.modules.pop(file.stem, None)
