"""Other families than Stable Diffusion from the command line: a run, its images and videos, its files."""

import json
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from fewstep.api import load_student
from fewstep.evaluation.images import ImageProtocol
from fewstep.report.run import render_run
from fewstep.student.folder import read_card

from .. import pipelines
from .common import error_of, fewstep
from .families import recipe

pytestmark = pytest.mark.usefixtures("elsewhere", "few_draws")


def test_videos_are_shown_as_strips_and_written_as_mp4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pipelines.save("cogvideox", tmp_path / "video")
    assert fewstep(monkeypatch, "distill", recipe(folder)) == 0
    assert (Path("runs/tiny/report.html")).is_file()
    grid = Image.open("runs/tiny/samples/step_000002.png")
    assert grid.width > 2 * 5 * 16  # five frames of each of two prompts
    assert fewstep(monkeypatch, "sample", "runs/tiny", "-p", "red cat", "--compare", "--out", "seen/x.png") == 0
    assert sorted(p.name for p in Path("seen").iterdir()) == ["x-0.mp4", "x.png"]
    assert "text-to-video" in Path("runs/tiny/final/README.md").read_text()
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 2)
    monkeypatch.setattr("fewstep.evaluation.images.OWN", (ImageProtocol("own-quick", 6, 2, seeds=3),))
    assert fewstep(monkeypatch, "evaluate", "runs/tiny") == 0
    measured(Path("runs/tiny"), "motion_ratio")
    capsys.readouterr()
    assert fewstep(monkeypatch, "evaluate", "runs/tiny", "--real", "seen") == 2
    assert error_of(capsys).startswith("error: --real: got seen, video makes videos; leave it out")


def measured(run: Path, *more: str) -> None:
    """Check that a run's student was measured, by the default command, in every number of the core."""
    result = json.loads((run / "final" / "eval.json").read_text())
    teacher, student = result["rows"][0], result["rows"][-1]
    assert result["protocol"] == "own-quick" and (teacher["model"], student["model"]) == ("teacher", "student")
    numbers = ("fd_teacher", "teacher_distance", "diversity_ratio", "saturation_ratio", "contrast_ratio", *more)
    for key in (*numbers, "sharpness_ratio", "state_std_ratio", "state_shift", "variety_ratio"):
        low, high = student["intervals"][key]
        assert low <= student[key] <= high, key
    assert student["nfe"] > 0 and student["seconds_per_image"] > 0
    assert any(one["metric"] == "teacher_distance" for one in result["paired"])
    for one in result["paired"]:
        assert 0 <= one["wins_interval"][0] <= one["wins"] <= one["wins_interval"][1] <= 1
    page = render_run(run).read_text()
    assert "<h2>Drift</h2>" in page and "Distance to the teacher" in page and "% of the images" in page


@pytest.mark.parametrize("family", ["sd3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sdxl", "pixart"))])
def test_a_student_of_any_family_is_measured_by_the_default_command(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pipelines.save(family, tmp_path / "xl")
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 2)
    monkeypatch.setattr("fewstep.evaluation.images.OWN", (ImageProtocol("own-quick", 8, 2, seeds=4),))
    method = {"name": "tdm", "steps": 2, "warmup": 0}
    assert fewstep(monkeypatch, "distill", recipe(folder, method=method)) == 0
    assert fewstep(monkeypatch, "evaluate", "runs/tiny") == 0
    measured(Path("runs/tiny"))


@pytest.mark.slow
def test_videos_of_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Wan: trained, sampled at its own rate of frames, and exported."""
    folder = pipelines.save("wan", tmp_path / "video")
    assert fewstep(monkeypatch, "distill", recipe(folder, size="32x16x5")) == 0
    card = read_card(Path("runs/tiny/final"))
    assert card.size == "32x16x5" and load_student("runs/tiny/final").backbone.shape == (4, 2, 2, 4)
    assert fewstep(monkeypatch, "sample", "runs/tiny", "-p", "red cat", "--out", "seen/x.png") == 0
    with av.open("seen/x-0.mp4") as video:
        stream = video.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (32, 16, 16)
    assert fewstep(monkeypatch, "export", "runs/tiny", "whole", "--format", "pipeline") == 0
    capsys.readouterr()
    assert fewstep(monkeypatch, "distill", recipe(folder, size=32), "--out", "runs/other") == 2
    assert "size: got 32, allowed for videos are width, height and frames" in error_of(capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("sd", "float32"),
        pytest.param("sdxl", "bfloat16", marks=pytest.mark.slow),
        pytest.param("sd3", "float32", marks=pytest.mark.slow),
    ],
)
def test_stages_of_two_sizes(family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's way: a smaller size first, then its own; the card and the pipeline know a size that is not the base's."""
    folder = pipelines.save(family, tmp_path / "xl")
    stage = {
        "method": {"steps": 2, "warmup": 0},
        "train": {"iterations": 1, "batch": 2, "lr": 1e-3, "fake_lr": 1e-3},
        "size": 32,
    }
    path = recipe(folder, method={"steps": 2, "warmup": 0}, warm_start=stage, size=64, dtype=dtype)
    assert fewstep(monkeypatch, "distill", path) == 0
    assert (read_card(Path("runs/tiny/warm_start/final")).size, read_card(Path("runs/tiny/final")).size) == (32, 64)
    student = load_student("runs/tiny/final")
    assert {p.dtype for n, p in student.network.named_parameters() if "lora" not in n} == {getattr(torch, dtype)}
    assert fewstep(monkeypatch, "sample", "runs/tiny", "-p", "red cat", "--out", "x.png") == 0
    assert fewstep(monkeypatch, "export", "runs/tiny", "merged", "--format", "merged") == 0
    assert "height=64, width=64" in Path("runs/tiny/final/README.md").read_text()


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f == "flux2" else pytest.mark.slow) for f in (*pipelines.FAMILIES, "wan-a14b")],
)
def test_imitation_then_matching(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of two stages on one set of trajectories: run, continued after its end, sampled and exported."""
    folder = pipelines.save(family, tmp_path / family)
    # In as many steps as the student's FLUX.1-dev, which is told its guidance, has nothing to imitate.
    data = {"source": "trajectories", "count": 4, "steps": 4, "guidance": 2.0, "solver": "ddim"}
    train = {"iterations": 1, "batch": 2, "lr": 1e-2, "fake_lr": 1e-2, "checkpoint_every": 1}
    first_method = {"name": "trajp-l", "steps": 2, "head": "none", "guidance": 2.0}
    changes: dict[str, object] = {
        "warm_start": {"method": first_method, "data": data, "train": train},
        "data": data,
        "method": {"steps": 2, "warmup": 0, "guidance": 2.0, "regression_weight": 2.0},
    }
    if family in pipelines.SIZES:
        changes["size"] = pipelines.SIZES[family]
    for iterations in (1, 2):
        path = recipe(folder, **changes, train=train | {"iterations": iterations})
        assert fewstep(monkeypatch, "distill", path) == 0
    first, last = (read_card(Path("runs/tiny") / part) for part in ("warm_start/final", "final"))
    assert (first.method, last.method, last.iterations) == ("trajp-l", "trajp-l-tdm", 2)
    assert fewstep(monkeypatch, "sample", "runs/tiny", "-p", "red cat", "--out", "x.png") == 0
    assert fewstep(monkeypatch, "export", "runs/tiny", "merged", "--format", "merged") == 0


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("cogvideox", {"size": 32}, "size: got 32, video makes images of one size"),
        ("sdxl", {"size": 33}, "size: got 33, allowed for video are multiples of 4"),
        ("sd3", {"size": 400}, "size: got 400, allowed for video are multiples of 4 up to 384"),
        (
            "sd3",
            {"method": {"steps": 2, "solver": "dpmpp", "warmup": 0}},
            "method.solver: got dpmpp, students of this family are exported for ddim or renoise",
        ),
        (
            "cogvideox",
            {"method": {"steps": 3, "warmup": 0}},
            "method.steps: got [3], students like this are exported for divisors of 1000",
        ),
    ],
)
def test_what_a_family_cannot_do_is_said_before_training(
    family: str,
    changes: dict[str, object],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = pipelines.save(family, tmp_path / "video")
    assert fewstep(monkeypatch, "distill", recipe(folder, **changes)) == 2
    assert said in error_of(capsys)
    assert not list(Path("runs").rglob("checkpoint-*"))
