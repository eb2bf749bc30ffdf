"""A recipe with a rounded base: both its stages, the hash of the weights as they were, and files that go with those."""

import json
from pathlib import Path

import pytest
import torch

from fewstep.api import load_student
from fewstep.backbones.load import fingerprint, load_teacher
from fewstep.roles.quantized import kind_of

from .. import tiny
from .common import error_of, fewstep
from .families import recipe

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.pipeline(channels=(96, 128)).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.usefixtures("uncounted")
@pytest.mark.slow
def test_a_student_of_a_rounded_base_goes_with_the_base_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"method": {"steps": 2, "warmup": 0}, "train": {"iterations": 1, "batch": 2, "lr": 1e-3, "fake_lr": 1e-3}}
    path = recipe(folder, method={"steps": 2, "warmup": 0}, roles={"rank": 2, "quantize": "int8"}, warm_start=stage)
    assert fewstep(monkeypatch, "distill", path, "--dry-run") == 0
    assert "quantize: int8" in capsys.readouterr().out
    assert fewstep(monkeypatch, "distill", path) == 0
    assert capsys.readouterr().out.count("one shared network, int8") == 2
    original = fingerprint(load_teacher(folder).module)
    for run in (Path("runs/tiny"), Path("runs/tiny/warm_start")):
        assert json.loads((run / "run.json").read_text())["base_hash"] == original
        assert json.loads((run / "final" / "fewstep.json").read_text())["base_hash"] == original
    assert "from prompts alone, next to its base in int8." in Path("runs/tiny/final/README.md").read_text()
    student = load_student("runs/tiny/final")
    assert kind_of(student.network) is None
    assert {p.dtype for p in student.network.parameters()} == {torch.float32}
    assert fewstep(monkeypatch, "export", "runs/tiny", "merged", "--format", "merged") == 0


def test_a_missing_package_is_said_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fewstep.training.optimizer.find_spec", lambda name: None)
    monkeypatch.setattr("fewstep.cli.distill.loaded", lambda *_: pytest.fail("loaded"))
    assert fewstep(monkeypatch, "distill", recipe(folder), "--set", "train.optimizer=adamw8bit") == 2
    assert "pip install 'fewstep[train8bit]'" in error_of(capsys)
