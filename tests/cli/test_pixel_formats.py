"""Exported students of pixel models are themselves in diffusers.

Their teachers have classes or none, and a table of betas or EDM's preconditioning.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from torch import Tensor

import fewstep
from fewstep.backbones import miniature
from fewstep.backbones.unconditional import edm_scheduler, pixel_unet, save_pixel_model

from .common import RECIPE, error_of
from .common import fewstep as command

LABELS = ("zero", "one", "two")
SCHEDULERS = {"vp": miniature.scheduler, "edm": lambda: edm_scheduler(0.6)}


def written(process: str, labels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Write the recipe of a five-iteration run, and its teacher.

    The teacher has random weights. The given folder becomes the working folder.
    """
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    save_pixel_model(
        Path("digits"), pixel_unet([16, 32], [False, True], 1, 8, len(labels)), SCHEDULERS[process](), labels
    )
    Path("names.txt").write_text("".join(f"{name}\n" for name in labels or ("image",)))
    value: dict[str, Any] = {
        **RECIPE,
        "teacher": "digits",
        "prompts": {"source": "names.txt"},
        "preview": {"every": 5, "teacher_steps": 3},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def by_diffusers(folder: str, steps: int, options: dict[str, Any]) -> Tensor:
    """What the exported folder draws without fewstep, seeds 3 and 4."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(s) for s in (3, 4)]
    return pipe(batch_size=2, num_inference_steps=steps, generator=seeds, output_type="pt", **options).images.expand(
        -1, 3, -1, -1
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "labels"),
    [
        ("edm", LABELS),
        pytest.param("edm", (), marks=pytest.mark.slow),
        pytest.param("vp", LABELS, marks=pytest.mark.slow),
        pytest.param("vp", (), marks=pytest.mark.slow),
    ],
)
def test_an_exported_student_is_itself_in_diffusers(
    process: str, labels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of two step counts, each exported for itself, with the class that it is told."""
    recipe = written(process, labels, monkeypatch, tmp_path)
    unify = ("--set", "method.name=tdm-unify", "--set", "method.steps=[4, 2]", "--set", "train.lr=0.02")
    assert command(monkeypatch, "distill", recipe, *unify) == 0
    student = fewstep.load_student("runs/tiny/final")
    names, options = (["one", "two"], {"class_labels": [1, 2]}) if labels else (["", ""], {})
    for steps in (4, 2):
        assert (
            command(monkeypatch, "export", "runs/tiny", f"out-{steps}", "--format", "pipeline", "--steps", steps) == 0
        )
        wanted = fewstep.sample(student, names, [3, 4], steps=steps)
        assert (by_diffusers(f"out-{steps}", steps, options) - wanted).abs().max() <= 1e-4
        teacher = fewstep.sample(student.backbone, names, [3, 4], steps=steps)
        assert (teacher - wanted).abs().max() > 0.02
        assert fewstep.load_teacher(f"out-{steps}").encode(names).keys() == ({"label"} if labels else set())


def test_what_cannot_be_exported_from_edm_s_levels_is_not_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written("edm", (), monkeypatch, tmp_path)
    assert command(monkeypatch, "distill", recipe, "--set", "method.shift=2") == 2
    assert error_of(capsys).endswith("exported for even times alone; set it to 1")
    assert not Path("runs/tiny").exists()


@pytest.mark.slow
def test_trajp_l_on_edm_s_levels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a head the student is fewstep's alone, in files of its own; its LoRA by itself is a pipeline."""
    recipe = written("edm", LABELS, monkeypatch, tmp_path)
    value = yaml.safe_load(recipe.read_text()) | {"data": {"source": "trajectories", "count": 40, "steps": 8}}
    value["method"] = {"name": "trajp-l", "steps": 2, "guidance": 2.0}
    value["train"]["lr"] = 0.02
    recipe.write_text(yaml.safe_dump(value))
    assert command(monkeypatch, "distill", recipe) == 0
    wanted = fewstep.sample(fewstep.load_student("runs/tiny/final"), ["one", "two"], [3, 4])
    assert command(monkeypatch, "export", "runs/tiny", "student") == 0
    assert (fewstep.sample(fewstep.load_student("student"), ["one", "two"], [3, 4]) - wanted).abs().max() <= 1e-4
    capsys.readouterr()
    assert command(monkeypatch, "export", "runs/tiny", "out", "--format", "pipeline") == 2
    assert "this student is sampled with a head" in error_of(capsys)
    assert command(monkeypatch, "distill", recipe, "--set", "method.head=none", "--out", "runs/bare") == 0
    assert command(monkeypatch, "export", "runs/bare", "bare", "--format", "pipeline") == 0
    alone = fewstep.sample(fewstep.load_student("runs/bare/final"), ["one", "two"], [3, 4])
    assert (by_diffusers("bare", 2, {"class_labels": [1, 2]}) - alone).abs().max() <= 1e-4
    assert (alone - wanted).abs().max() > 1e-3
