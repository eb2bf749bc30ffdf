"""Students of pixel teachers from the command line, with classes and without."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMPipeline

import fewstep
from fewstep.backbones import miniature
from fewstep.backbones.load import load_teacher
from fewstep.backbones.unconditional import PixelModel, save_pixel_model

from .. import tiny
from .test_distill import error_of
from .test_distill import fewstep as command

CLASSES = ("cat", "sea lion")


def recipe(folder: Path, labels: tuple[str, ...], **changes: object) -> Path:
    """Two iterations of TrajP-L on a pixel teacher of random weights, both in this folder."""
    teacher = folder / "pixels"
    save_pixel_model(teacher, tiny.pixels(labels).pipe.unet, miniature.scheduler(), labels)
    (teacher / "prompts.txt").write_text("\n".join(labels) + "\n")
    value = {
        "kind": "distill", "name": "pix", "teacher": str(teacher), "prompts": {"source": str(teacher / "prompts.txt")},
        "method": {"name": "trajp-l", "steps": 2, "guidance": 2.0}, "roles": {"rank": 2}, "data": {"source": "trajectories", "count": 6, "steps": 4},
        "train": {"iterations": 2, "batch": 4, "lr": 0.02, "fake_lr": 0.02, "checkpoint_every": 2}, "preview": {"every": 2, "teacher_steps": 3},
    } | changes  # fmt: skip
    (folder / "pix.yaml").write_text(yaml.safe_dump(value))
    return folder / "pix.yaml"


@pytest.fixture(scope="module", params=[CLASSES, ()], ids=["classes", "no classes"])
def headless(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """The run of a student without a head, and its classes."""
    folder = tmp_path_factory.mktemp("headless")
    path = recipe(folder, request.param, method={"name": "trajp-l", "steps": 2, "guidance": 2.0, "head": "none"})
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, "distill", path, "--out", folder / "run") == 0
    return folder / "run", request.param


def test_a_pipeline_folder_is_the_student(headless: tuple[Path, tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In diffusers where there are no classes, of which its pipeline knows nothing; everywhere in fewstep, the classes' names included."""
    run, labels = headless
    assert command(monkeypatch, "export", run, tmp_path / "pipe", "--format", "pipeline") == 0
    prompts, student = [labels[1] if labels else "", ""], fewstep.load_student(run / "final")
    wanted = fewstep.sample(student, prompts, [3, 4])
    assert (
        wanted - fewstep.sample(student.student.backbone, prompts, [3, 4], steps=2)
    ).abs().max() > 0.01  # the student is not the teacher
    again = load_teacher(tmp_path / "pipe")
    assert isinstance(again, PixelModel) and again.labels == labels
    assert (fewstep.sample(again, prompts, [3, 4], steps=2) - wanted).abs().max() <= 1e-4
    if not labels:
        pipe = DDPMPipeline.from_pretrained(tmp_path / "pipe")
        seeds = [torch.Generator().manual_seed(s) for s in (3, 4)]
        drawn = pipe(batch_size=2, num_inference_steps=2, generator=seeds, output_type="pt").images
        assert (drawn - wanted).abs().max() <= 1e-4


def test_what_may_be_asked_of_it(
    headless: tuple[Path, tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student and its teacher take a class's name, or nothing where there are no classes; the empty prompt is that of no class."""
    (run, labels), out = headless, tmp_path / "x.png"
    for source in (run, run.parent / "pixels"):
        assert command(monkeypatch, "sample", source, "-p", "", "--steps", 2, "-o", out) == 0
        if labels:
            assert command(monkeypatch, "sample", source, "-p", "sea lion", "-p", "cat", "--steps", 2, "-o", out) == 0
            wrong = [
                ((), "--prompt: got none, pixels draws cat, sea lion; say which, e.g. -p cat"),
                (("-p", "dog"), "its classes are cat, sea lion"),
            ]
        else:
            assert command(monkeypatch, "sample", source, "--steps", 2, "-n", 3, "-o", out) == 0
            wrong = [(("-p", "dog"), "--prompt: got 'dog', pixels takes no prompt; leave it out")]
        for how, said in wrong:
            capsys.readouterr()
            assert command(monkeypatch, "sample", source, *how, "--steps", 2, "-o", out) == 2
            assert said in error_of(capsys)


def test_the_model_cards_snippet_draws(headless: tuple[Path, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = headless
    snippet = re.search(r"```python\n(.*?)```", (run / "final" / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    monkeypatch.chdir(run)
    names: dict[str, torch.Tensor] = {}
    exec(snippet[1], names)
    assert torch.equal(names["pictures"], fewstep.sample(fewstep.load_student("final"), [""]))
