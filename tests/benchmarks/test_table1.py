"""`benchmarks/table1.py` runs to its end on tiny stand-ins of the paper's bases."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.evaluation.images import ImageProtocol

from .. import pipelines

SMALL = [
    "method.steps=2",
    "method.warmup=0",
    "roles.rank=2",
    "roles.checkpointing=false",
    "train.iterations=1",
    "train.batch=2",
    "train.accumulate=1",
    "train.decay=0",
    "train.precision=no",
    "dtype=float32",
    "preview.teacher_steps=2",
]
STAGES = {"sdxl": ["size=null", "warm_start.size=null", "warm_start.train.global_batch=2"]}  # the first is small, too
STAGED = ("method.steps", "method.warmup", "train.iterations", "train.batch", "train.precision")


@pytest.mark.parametrize(
    ("base", "family"),
    [
        ("sd15", "sd"),
        pytest.param("cogvideox", "cogvideox", marks=pytest.mark.slow),
        pytest.param("sd35", "sd3", marks=pytest.mark.slow),
        pytest.param("sdxl", "sdxl", marks=pytest.mark.slow),
        pytest.param("pixart", "pixart", marks=pytest.mark.slow),
    ],
)
def test_a_table_is_one_command(
    base: str, family: str, load: Callable[[str], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fewstep.cli.distill.look_before", lambda *_: None)
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 2)
    monkeypatch.setattr("fewstep.evaluation.images.OWN", (ImageProtocol("own-quick", 6, 2, seeds=3),))
    monkeypatch.setattr("fewstep.evaluation.bootstrap.DRAWS", 20)
    Path("prompts.txt").write_text("red cat\nblue dog\n")
    which = ["--video" if base == "cogvideox" else "--base", base]
    teacher = ["--teacher", str(pipelines.save(family, tmp_path / "teacher"))]
    how = ["--protocol", "own-quick", "--metrics", "", "--against", "", "--to", str(tmp_path)]
    small = [*SMALL, *STAGES.get(base, [])]
    small += [f"warm_start.{one}" for one in SMALL if base in STAGES and one.partition("=")[0] in STAGED]
    settings = [word for setting in small for word in ("--set", setting)]
    monkeypatch.setattr("sys.argv", ["table1.py", *which, *teacher, *how, *settings])
    load("table1")["main"]()
    made = json.loads((tmp_path / f"table-{base}.json").read_text())
    assert {row["model"] for row in made["rows"]} == {"teacher", "student"}
    text = (tmp_path / f"table-{base}.md").read_text()
    assert f"# Table of {base}" in text and "FD to teacher" in text and " to " in text
    assert "student beats teacher in teacher_distance at" in text
