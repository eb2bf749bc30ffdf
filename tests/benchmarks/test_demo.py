"""`benchmarks/demo.py`: the rows of a run's evaluation, with where they come from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..project import ROOT


def test_a_finished_run_becomes_the_demo_s_numbers(
    load: Callable[[str], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = json.loads((ROOT / "benchmarks" / "demo.json").read_text(encoding="utf-8"))
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    evaluation = {key: stored["common"][key] for key in ("protocol", "fd_floor")} | {"rows": stored["rows"]}
    (final / "eval.json").write_text(json.dumps(evaluation))
    (final / "fewstep.json").write_text(json.dumps({"train_seconds": 222.0, "iterations": 260}))
    monkeypatch.setattr("sys.argv", ["demo.py", "--run", str(tmp_path / "run"), "--to", str(tmp_path)])
    load("demo")["main"]()
    made, text = json.loads((tmp_path / "demo.json").read_text()), (tmp_path / "demo.md").read_text()
    assert made["rows"] == stored["rows"] and made.keys() == stored.keys()
    assert made["common"] == stored["common"] | {"train_seconds": 222.0}
    assert "260 iterations in 3.7 minutes by the clock" in " ".join(text.split())
    assert [line for line in text.splitlines() if line.startswith(("| teacher", "| student"))] == [
        line
        for line in (ROOT / "benchmarks" / "demo.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(("| teacher", "| student"))
    ]
