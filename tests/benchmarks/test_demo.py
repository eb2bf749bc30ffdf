"""`benchmarks/demo.py`: the rows of a run's evaluation, with where they come from."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from ..project import ROOT


def test_a_finished_run_becomes_the_demo_s_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = json.loads((ROOT / "benchmarks" / "demo.json").read_text(encoding="utf-8"))
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (final / "eval.json").write_text(json.dumps({key: stored[key] for key in ("protocol", "fd_floor", "rows")}))
    (final / "fewstep.json").write_text(json.dumps({"train_seconds": 222.0, "iterations": 260}))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "origin", raising=False)
    monkeypatch.setattr("sys.argv", ["demo.py", "--run", str(tmp_path / "run"), "--to", str(tmp_path)])
    runpy.run_path(str(ROOT / "benchmarks" / "demo.py"), run_name="__main__")
    made, text = json.loads((tmp_path / "demo.json").read_text()), (tmp_path / "demo.md").read_text()
    assert made["rows"] == stored["rows"] and made.keys() == stored.keys() and made["train_seconds"] == 222.0
    assert "260 iterations in 3.7 minutes by the clock" in text
    assert [line for line in text.splitlines() if line.startswith(("| teacher", "| student"))] == [
        line
        for line in (ROOT / "benchmarks" / "demo.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(("| teacher", "| student"))
    ]
