"""Students of pixel teachers from the command line, with classes and without."""

import html
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline

import fewstep
from fewstep.backbones import miniature
from fewstep.backbones.load import load_teacher
from fewstep.backbones.unconditional import PixelModel, save_pixel_model
from fewstep.cli.finish import quality_of
from fewstep.evaluation.images import ImageProtocol

from .. import tiny
from ..snippets import snippet_of
from .common import error_of
from .common import fewstep as command

CLASSES = ("cat", "sea lion")


def recipe(folder: Path, labels: tuple[str, ...], **changes: object) -> Path:
    """Two iterations of TrajP-L on a pixel teacher of random weights, both in this folder."""
    teacher = folder / "pixels"
    save_pixel_model(teacher, tiny.pixels(labels).pipe.unet, miniature.scheduler(), labels)
    (teacher / "prompts.txt").write_text("\n".join(labels) + "\n")
    value = {
        "kind": "distill",
        "name": "pix",
        "teacher": str(teacher),
        "prompts": {"source": str(teacher / "prompts.txt")},
        "method": {"name": "trajp-l", "steps": 2, "guidance": 2.0},
        "roles": {"rank": 2},
        "data": {"source": "trajectories", "count": 6, "steps": 4},
        "train": {"iterations": 2, "batch": 4, "lr": 0.02, "fake_lr": 0.02, "checkpoint_every": 2},
        "preview": {"every": 2, "teacher_steps": 3},
    } | changes
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


def test_a_pipeline_folder_is_the_student(
    headless: tuple[Path, tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In diffusers and in fewstep, the classes' names included (more in `test_pixel_formats.py`)."""
    run, labels = headless
    assert command(monkeypatch, "export", run, tmp_path / "pipe", "--format", "pipeline") == 0
    prompts, student = [labels[1] if labels else "", ""], fewstep.load_student(run / "final")
    wanted = fewstep.sample(student, prompts, [3, 4])
    assert (
        wanted - fewstep.sample(student.backbone, prompts, [3, 4], steps=2)
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
    headless: tuple[Path, tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A student of classes takes the name of a class.

    Without classes it takes nothing. Its teacher does the same. The empty prompt is that of no class.
    """
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
    code = snippet_of(run / "final")
    monkeypatch.chdir(run)
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert torch.equal(names["images"], fewstep.sample(fewstep.load_student("final"), [""]))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations of six images, a teacher of three steps."""
    monkeypatch.setattr("fewstep.evaluation.images.IMAGES", (ImageProtocol("images", 6, components=3, batch=4),))
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 3)


def real(folder: Path, count: int, size: int = 8) -> Path:
    """An npz of noise."""
    path = folder / f"real-{count}-{size}.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    return path


@pytest.mark.usefixtures("few")
def test_from_a_teacher_of_classes_to_its_students_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command on a student with a head, measured against real images along the way, at its end and later."""
    monkeypatch.chdir(tmp_path)
    data = {"source": "trajectories", "count": 6, "steps": 4, "real": str(real(tmp_path, 14))}
    path = recipe(
        tmp_path,
        CLASSES,
        data=data,
        evaluate="images",
        preview={"every": 2, "teacher_steps": 3, "protocol": "images"},
    )
    assert command(monkeypatch, "distill", path) == 0
    run = Path("runs/pix")
    result = json.loads((run / "final" / "eval.json").read_text())
    rows = result["rows"]
    assert [(r["model"], r["steps"], r["guidance"], r["nfe"], r["n"]) for r in rows] == [
        ("teacher", 3, 2.0, 6, 6), ("teacher", 2, 2.0, 4, 6), ("teacher", 2, 1.0, 2, 6), ("teacher", 1, 2.0, 2, 6),
        ("student", 2, 1.0, 2, 6)
    ]  # fmt: skip
    assert all(r["fd_real"] > 0 for r in rows) and rows[0]["fd_teacher"] is None and rows[4]["fd_teacher"] > 0
    points = [
        line["quality"]["fd_real"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "quality" in line
    ]
    assert len(points) == 2 and points[-1] == pytest.approx(rows[4]["fd_real"], rel=1e-3)
    assert (
        f"quality  FD to real {rows[4]['fd_real']:.1f} in 2 NFE, teacher {rows[0]['fd_real']:.1f} in 6"
        in capsys.readouterr().out
    )
    assert command(monkeypatch, "sample", run, "-p", "sea lion", "--compare") == 0
    assert command(monkeypatch, "export", run, "merged", "--format", "merged") == 0
    again = fewstep.sample(fewstep.load_student("merged"), ["cat"])
    assert (again - fewstep.sample(fewstep.load_student(run / "final"), ["cat"])).abs().max() <= 1e-4
    capsys.readouterr()
    assert command(monkeypatch, "export", run, "pipe", "--format", "pipeline") == 2
    assert "--format: this student is sampled with a head" in error_of(capsys)
    assert command(monkeypatch, "evaluate", run) == 0  # under the protocol of its kind, against what its recipe names
    assert (
        "images: FD-efflite0, 3 components of the real images' features, 6 images against 6" in capsys.readouterr().out
    )
    assert json.loads((run / "final" / "eval.json").read_text())["rows"][4]["fd_real"] == rows[4]["fd_real"]
    (run / "report.html").unlink()
    assert command(monkeypatch, "report", run) == 0
    page = (run / "report.html").read_text()
    assert "FD to real images" in page and "FD to teacher" in page and "Distance to real images while training" in page


@pytest.mark.usefixtures("few")
def test_without_real_images_a_student_is_measured_against_its_teacher(
    headless: tuple[Path, tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, labels = headless
    assert command(monkeypatch, "evaluate", run) == 0
    said = capsys.readouterr().out
    assert "images: FD-efflite0, 3 components of the teacher's features, 6 images against 6; 6 images a row" in said
    assert "fd_teacher" in said and "fd_real" not in said and "retrieval" not in said
    rows = json.loads((run / "final" / "eval.json").read_text())["rows"]
    assert [r["nfe"] for r in rows] == ([6, 4, 2, 2, 2] if labels else [3, 2, 2])
    calls = 6 * sum(
        r["nfe"] for r in rows
    )  # of six images a row: by images alone the time left would be a few steps' or fifty's
    assert f"evaluating, NFE {calls}/{calls}" in said
    assert rows[-1]["fd_teacher"] > 0
    assert quality_of(rows[-1], rows[0]).startswith(
        f"FD to the teacher in {rows[0]['nfe']} NFE {rows[-1]['fd_teacher']:.1f} in 2 "
    )
    assert command(monkeypatch, "report", run) == 0
    assert f"Fréchet distance to the teacher's images of {rows[0]['nfe']} network evaluations" in html.unescape(
        (run / "report.html").read_text()
    )
    assert command(monkeypatch, "evaluate", run, "--real", real(tmp_path, 6), "-o", tmp_path / "e.json") == 0
    assert all(r["fd_real"] > 0 for r in json.loads((tmp_path / "e.json").read_text())["rows"])
    for how, expected in (
        (("--real", "nowhere"), "--real: there is no nowhere; pass a folder"),
        (("--real", tmp_path), f"--real: {tmp_path} has no images"),
        (("--real", real(tmp_path, 5)), "has 5 images, protocol images compares 6 with 6"),
        (("--real", real(tmp_path, 6, 9)), "are 9x9, pixels draws 8x8"),
        (("--protocol", "emoji-quick"), "--protocol: got emoji-quick, pixels is a pixel model; choose one of images"),
        (
            ("--protocol", "other"),
            "protocol: got 'other'; choose one of emoji-quick, emoji-medium, emoji-full, images",
        ),
    ):
        capsys.readouterr()
        assert command(monkeypatch, "evaluate", run, *how) == 2
        shown = capsys.readouterr()
        assert f"error: {expected}" in shown.err or ("error: --real: " in shown.err and expected in shown.err)
        assert "evaluating" not in shown.out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"evaluate": "emoji-quick"},
            "evaluate: got emoji-quick, pixels is a pixel model; choose one of images-quick, images",
        ),
        (
            {"preview": {"protocol": "images"}},
            "preview.protocol: got images, which needs real images here; set data.real",
        ),
        (
            {"evaluate": "images", "data": {"source": "trajectories", "real": "nowhere"}},
            "data.real: there is no nowhere",
        ),
    ],
)
def test_what_cannot_be_measured_is_not_trained(
    changes: dict[str, object],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "distill", recipe(tmp_path, CLASSES, **changes)) == 2
    assert said in error_of(capsys)
    assert not Path("runs").exists()
