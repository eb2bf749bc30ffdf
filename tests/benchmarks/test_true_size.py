"""The benchmark at true size, rehearsed on a tiny pipeline by the real command line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..project import ROOT

Load = Callable[[str], dict[str, Any]]


@pytest.mark.slow
def test_a_tiny_family_is_killed_resumed_exported_and_drawn(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load("true_size")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setattr(sys, "argv", ["true_size.py", "sd15", "--tiny", "--to", str(tmp_path), "--work", str(tmp_path)])
    bench["main"]()
    (row,) = json.loads((tmp_path / "true_size.json").read_text())["rows"]
    assert row["planned"] > 0 and row["imports"] > row["planned"]  # a tiny pipeline is smaller than Python itself
    assert row["image"] > 0 and row["killed_at"] < "step-000003"
    assert {"pipeline", "checkpoint", "student", "kohya", "merged"} <= set(row["files"]) and all(row["files"].values())
    assert not list(tmp_path.glob("tmp*"))
    record = load("records")["read_record"](tmp_path / "true_size.json")
    assert (tmp_path / "true_size.md").read_text() == bench["page"](record)
