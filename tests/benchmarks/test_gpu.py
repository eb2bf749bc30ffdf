"""The GPU's benchmark, rehearsed: every stage runs to its row, and the page says what it found."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..project import ROOT

Load = Callable[[str], dict[str, Any]]


@pytest.mark.slow
def test_every_stage_runs_in_a_rehearsal(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load("gpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(tmp_path)])
    gpu["main"]()
    stored = json.loads((tmp_path / "gpu.json").read_text())
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in stored["rows"]:
        rows.setdefault(row["stage"], []).append(row)
    assert set(rows) == set(gpu["STAGES"])
    timed = [row for own in rows.values() for row in own if "ratio" in row]
    assert {row["stage"] for row in timed} == {*gpu["CARDS"]} and len(rows["sd15"]) == 5
    assert all(row["seconds"] > 0 and row["ratio"] > 0.5 and row["reads"] == 0 for row in timed)
    assert all(set(row["roles"]) == {"rollout step", "student", "teacher", "fake"} for row in timed)
    (resumed,) = rows["resume"]
    assert resumed["equal"] and resumed["difference"] == 0 and resumed["killed_after"] == 2
    (tests,) = rows["tests"]
    assert tests["counts"] == {"passed": 1} and tests["failed"] == []
    assert rows["teacher"][0]["images_per_second"] > 0
    page = (tmp_path / "gpu.md").read_text()
    assert page == gpu["page"](load("records")["read_record"](tmp_path / "gpu.json"))
    assert "bit for bit" in page and "without channels_last" in page


def test_without_a_gpu_it_says_what_can_be_done(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = load("gpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, said in (([], "rehearse with --tiny"), (["--tiny"], "choose another folder")):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        with pytest.raises(SystemExit):
            gpu["main"]()
        assert said in capsys.readouterr().err


def test_a_stage_that_fails_or_takes_too_long_leaves_a_row(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = load("gpu")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    gpu["run_apart"]("teacher", tmp_path, 9)
    rows = [r for r in json.loads((tmp_path / "gpu.json").read_text())["rows"] if r["stage"] == "teacher"]
    assert rows[-1]["case"] == "failed" and "failed" in (tmp_path / "gpu.md").read_text()
