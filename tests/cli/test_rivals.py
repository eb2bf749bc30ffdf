"""Public students beside one's own, from the files that their pages offer; tiny ones in their place."""

import json
import shutil
from pathlib import Path

import pytest

from fewstep.api import load_student
from fewstep.backbones.load import pipeline_of
from fewstep.backbones.rivals import RIVALS, draw_rival, rival_named, rival_pipeline
from fewstep.core.solvers import SOLVERS
from fewstep.evaluation.images import ImageProtocol
from fewstep.evaluation.weights import PLACE
from fewstep.runs.sampling import sample

from .common import error_of
from .common import fewstep as command


def placed(final: Path, repo: str, name: str, weights: Path) -> Path:
    """The student's LoRA under a public student's name, where weights are looked for."""
    folder = weights / repo.replace("/", "--")
    folder.mkdir(parents=True)
    shutil.copyfile(final / "pytorch_lora_weights.safetensors", folder / name)
    return folder


def test_a_lora_is_sampled_as_its_page_says(final: Path, tmp_path: Path) -> None:
    """A student's own LoRA, sampled by the rules of Hyper-SD, gives its own images: DDIM, trailing, from one noise."""
    student = load_student(final)
    assert student.card.solver["4"] == "ddim" and "ddim" in SOLVERS
    base = pipeline_of(student.backbone)
    rival = rival_named("hyper-sd", base)
    folder = placed(final, rival.repo, rival.files[0], tmp_path)
    pipe = rival_pipeline(base, rival, folder)
    prompts, seeds = ["red cat", "blue dog"], [3, 4]
    theirs = draw_rival(pipe, rival, prompts, seeds, student.backbone.shape, student.backbone.image_size)
    own = sample(student, prompts, seeds)
    plain = sample(student.backbone, prompts, seeds, steps=4)
    assert (theirs - own).abs().max() <= 0.02 < (theirs - plain).abs().max()


def test_students_stand_beside_rivals_and_are_compared_by_image(
    final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path / "weights"))
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 3)
    monkeypatch.setattr("fewstep.evaluation.images.OWN", (ImageProtocol("own-quick", 6, 2, seeds=3),))
    for name in ("lcm-lora", "tcd"):
        rival = next(r for r in RIVALS if r.name == name and r.base == "StableDiffusionPipeline")
        placed(final, rival.repo, rival.files[0], tmp_path / "weights")
    shutil.copytree(final, "again")
    assert command(monkeypatch, "evaluate", final, "--against", "lcm-lora,tcd,again") == 0
    result = json.loads((final / "eval.json").read_text())
    models = [row["model"] for row in result["rows"]]
    assert models[-3:-1] == ["lcm-lora", "tcd"] and result["rows"][-2]["nfe"] == 4
    assert result["rows"][-1]["teacher_distance"] == pytest.approx(result["rows"][-4]["teacher_distance"], rel=1e-4)
    student = models.index("student")
    assert {p["against"] for p in result["paired"] if p["row"] == student} >= set(range(len(models) - 3, len(models)))
    assert "beats lcm-lora@4 (4 NFE) in teacher_distance" in capsys.readouterr().out


def test_what_is_not_there_is_said_in_one_line(
    final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))
    for name, said in (
        ("hyper-sd", "--against hyper-sd: its weights cannot be had here; put Hyper-SD15-4steps-lora.safetensors of"),
        ("dmd2", "--against: got dmd2, of StableDiffusionPipeline there are lcm-lora, hyper-sd"),
        ("perflow", "--against: perflow cannot be run here: its scheduler is in no diffusers release"),
    ):
        assert command(monkeypatch, "evaluate", final, "--against", name) == 2
        assert said in error_of(capsys)


def test_every_rival_is_of_a_family_or_says_why_not() -> None:
    """Names are one for each base, and the table has those that people compare with."""
    assert len({(r.name, r.base) for r in RIVALS}) == len(RIVALS)
    assert {r.name for r in RIVALS} >= {"lcm-lora", "hyper-sd", "tcd", "sdxl-lightning", "sdxl-turbo", "dmd2", "klein"}
    assert all(r.scheduler is not None for r in RIVALS if r.kind == "lora" and not r.missing)
