"""Loading a benchmark as `python benchmarks/NAME.py` does: with the modules next to it."""

import runpy
import sys
from collections.abc import Callable
from typing import Any

import pytest

from ..project import ROOT

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Return a function that loads a benchmark's names; the modules next to it are forgotten after the test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for file in FOLDER.glob("*.py"):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))
