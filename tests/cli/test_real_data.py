"""Real images on the command line: a teacher fine-tuned on them is a teacher, and the adversarial term takes them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

import fewstep

from .common import error_of
from .common import fewstep as command


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("red cat", (255, 0, 0)), ("blue dog", (0, 0, 255))):
        Image.new("RGB", (20, 16), colour).save(folder / f"{name.replace(' ', '_')}.png")
    return folder


@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_fine_tuned_teacher_is_a_teacher(
    recipe: Path, teacher: Path, images: Path, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = {
        "kind": "finetune",
        "name": "tuned",
        "teacher": str(teacher),
        "data": {"source": str(images)},
        "roles": {"lora": share, "rank": 2},
        "fit": {"steps": 4, "batch": 4, "lr": 0.01, "warmup": 1, "decay": 1, "ema": 0.0, "checkpoint_every": 2},
    }
    Path("tuned.yaml").write_text(yaml.safe_dump(value))
    assert command(monkeypatch, "train-teacher", "tuned.yaml") == 0
    tuned = Path("runs/tuned/teacher")
    assert (tuned / "prompts.txt").read_text().split("\n") == ["blue dog", "red cat", ""]
    a, b = (fewstep.sample(fewstep.load_teacher(t), ["red cat"], [0], steps=3) for t in (teacher, tuned))
    assert (a - b).abs().max() > 1e-3
    assert (
        command(
            monkeypatch,
            "distill",
            recipe,
            "--teacher",
            tuned,
            "--prompts",
            tuned / "prompts.txt",
            "--out",
            "runs/after",
        )
        == 0
    )


@pytest.mark.slow
def test_an_adversarial_run_stops_and_resumes_bit_for_bit(
    recipe: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gan = ("--set", "method.gan=0.1", "--set", f"data.source={images}", "--set", "train.checkpoint_every=2")
    assert command(monkeypatch, "distill", recipe, *gan, "--out", "runs/straight") == 0
    assert command(monkeypatch, "distill", recipe, *gan, "--out", "runs/parts", "--set", "train.iterations=3") == 0
    assert command(monkeypatch, "distill", recipe, *gan, "--out", "runs/parts") == 0
    lines = [
        [json.loads(line) for line in (Path("runs") / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("straight", "parts")
    ]
    keys = ("iteration", "student_loss", "fake_loss", "discriminator_loss", "gan_loss")
    straight, parts = ([[row.get(k) for k in keys] for row in rows if "fake_loss" in row] for rows in lines)
    assert straight == parts
    assert any(row[3] is not None for row in straight)


@pytest.mark.parametrize("name", ["lcm", "progressive"])
def test_imitation_starts_from_the_teachers_own_images(
    recipe: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = (
        "--set",
        f"method={{name: {name}, steps: 2}}",
        "--set",
        "data={source: teacher, count: 6, steps: 2}",
        "--set",
        "train.iterations=4",
    )
    assert command(monkeypatch, "distill", recipe, *how) == 0
    student = fewstep.load_student("runs/tiny/final")
    assert student.card.solver == {"2": "renoise" if name == "lcm" else "ddim"}
    assert fewstep.sample(student, ["red cat"], [0]).shape == (1, 3, 16, 16)


def test_the_term_and_the_images_go_together(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for dry in ((), ("--dry-run",)):
        assert command(monkeypatch, "distill", recipe, "--set", "method.gan=0.1", *dry) == 2
        assert "data.source: method tdm needs images; pass a folder of captioned ones" in error_of(capsys)
        nowhere = ("--set", "method.gan=0.1", "--set", "data.source=nowhere", *dry)
        assert command(monkeypatch, "distill", recipe, *nowhere) == 2
        assert "data.source: there is no nowhere" in error_of(capsys)


@pytest.mark.usefixtures("uncounted")
def test_what_is_found_and_what_it_takes_is_said_first(
    recipe: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run first says what it found and will write.

    It counts prompts, images, captions and bytes. A full disk is found before anything is written.
    """
    Path("prompts.csv").write_text('id,prompt\n1,"red cat, wet"\n2,\n3,blue dog\n4,blue dog\n')
    assert command(monkeypatch, "distill", recipe, "--prompts", "prompts.csv", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "2 prompts in prompts.csv: 1 empty, 1 repeated" in said
    assert re.search(r"embeddings of 2 prompts, at most: [\d.]+ KiB, of [\d.]+ [KMG]iB that are free", said)
    (images / "blue_dog.caption").write_text("a dog")
    monkeypatch.setattr("fewstep.cli.progress.WORTH_SAYING", 1)
    gan = (
        "--set",
        "method.gan=0.1",
        "--set",
        f"data.source={images}",
        "--set",
        "train.iterations=1",
        "--set",
        "method.warmup=0",
    )
    assert command(monkeypatch, "distill", recipe, *gan) == 0
    said = capsys.readouterr().out
    assert f"2 images in {images}: 1 captions of .caption, 1 by name, 0 empty" in said
    assert len(re.findall(r"writing runs/tiny/embeddings/\S+: [\d.]+ KiB, of", said)) == 3
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    assert command(monkeypatch, "distill", recipe, "--out", "runs/full") == 2
    assert re.search(
        r"cannot write runs/full/embeddings/\S+: it takes 0\.0 GiB, 0\.0 GiB are free there", error_of(capsys)
    )
    assert not list(Path("runs/full").rglob("*.safetensors"))
