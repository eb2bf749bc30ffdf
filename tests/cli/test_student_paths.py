"""Learning from the trajectories of a finished student, for a few calls each, instead of the teacher's."""

from pathlib import Path

import pytest
import torch
import yaml

import fewstep
from fewstep.api import student_source, trajectory_times
from fewstep.backbones.base import Backbone
from fewstep.data.prompts import embed
from fewstep.data.trajectories import (
    OF_STUDENT,
    TRAJECTORIES,
    Trajectories,
    TrajectoryConfig,
    generate_trajectories,
    run_to_completion,
)
from fewstep.methods.trajectory_imitation import TrajectoryImitation
from fewstep.student.folder import read_card

from .common import error_of
from .common import fewstep as command

PROMPTS = ["red cat", "blue dog"]
FURTHER = TrajectoryImitation(steps=(2, 1), head="none")


def walked(base: Backbone, student: Path, folder: Path | None, method: TrajectoryImitation = FURTHER) -> Trajectories:
    times, data = trajectory_times(method, base), embed(base, PROMPTS, None, "x")
    config, source = TrajectoryConfig(count=4, seed=7, student=str(student)), student_source(base, student, times)
    assert source.nfe == 4
    return run_to_completion(generate_trajectories(base, data, config, times, source, folder, "teacher"))


def test_they_are_what_it_samples_and_the_teacher_stays_what_it_was(final: Path, teacher: Path) -> None:
    base = fewstep.load_teacher(str(teacher))
    before = fewstep.sample(base, PROMPTS, steps=3)
    paths = walked(base, final, None)
    own = fewstep.sample_trajectory(fewstep.load_student(final), paths.embeddings.prompts, [7, 8, 9, 10])
    assert torch.allclose(paths.states, torch.stack([own[i].x for i in (0, 2, 4)], 1), atol=1e-5)
    assert torch.allclose(paths.whole, torch.stack([s.x for s in own], 1), atol=1e-5)
    guided = fewstep.sample_trajectory(base, paths.embeddings.prompts, [7, 8, 9, 10], steps=4, guidance=2.0)
    assert (paths.states[:, -1] - guided[-1].x).abs().max() > 1e-2
    assert torch.equal(fewstep.sample(base, PROMPTS, steps=3), before)
    steps = list(
        fewstep.distill(
            base,
            FURTHER,
            PROMPTS,
            train=fewstep.TrainConfig(iterations=2, batch=2),
            trajectories=TrajectoryConfig(count=4, student=str(final)),
        )
    )
    assert torch.isfinite(
        torch.tensor(steps[-1].metrics["student_loss"])
    )  # on the same teacher, the adapter that walked taken out


def test_a_folder_holds_those_of_one_student(
    final: Path, teacher: Path, tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = fewstep.load_teacher(str(teacher)), tmp_path / "walked"
    first = walked(base, final, folder)
    again = walked(base, final, folder)
    assert torch.equal(first.states, again.states) and first.key == again.key
    assert command(monkeypatch, "distill", recipe, "--set", "train.lr=0.01", "--out", "runs/other") == 0
    with pytest.raises(ValueError, match="were made with another student; choose another folder"):
        walked(base, Path("runs/other/final"), folder)


def test_times_that_it_does_not_visit_are_refused(final: Path, teacher: Path) -> None:
    base = fewstep.load_teacher(str(teacher))
    with pytest.raises(
        ValueError, match=r"stops at 999, 749, 499, 249, -1, this one at 999, .*; set method.steps and method.shift so"
    ):
        walked(base, final, None, TrajectoryImitation(steps=3, head="none"))


@pytest.fixture
def further(recipe: Path) -> Path:
    """A recipe file of two stages: a student of 4 steps, then one of 4, 2 and 1 from its trajectories."""
    value = yaml.safe_load(recipe.read_text())
    imitation = {"name": "trajp-l", "guidance": 2.0, "head": "none"}
    value["warm_start"] = {
        "method": imitation | {"steps": 4},
        "train": value["train"] | {"lr": 0.02},
        "data": {"source": "trajectories", "count": 8, "steps": 8},
    }
    value["method"] = imitation | {"steps": [4, 2, 1]}
    value["data"] = {"source": "trajectories", "count": 12, "from_student": "warm_start"}
    recipe.write_text(yaml.safe_dump(value))
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("share", [True, False])
def test_a_second_stage_goes_further_from_the_first_ones_student(
    further: Path, share: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It begins as that one, told its step count from now on, and is what it was while nothing is trained."""
    how = (
        "--set",
        f"roles.lora={str(share).lower()}",
        "--set",
        "roles.exclude=[add_embedding, time_embedding.linear_2]",
    )
    assert command(monkeypatch, "distill", further, *how, "--dry-run") == 0
    assert not Path("runs").exists()
    assert command(monkeypatch, "distill", further, *how, "--set", "train.lr=1e-12") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "generating 12 trajectories of the student in runs/tiny/warm_start/final (4 NFE each, 48 in total)" in said
    assert {p.name for p in Path("runs/tiny").glob("traj*") if p.is_dir()} == {TRAJECTORIES, OF_STUDENT}
    page = Path("runs/tiny/report.html").read_text()
    assert "Straying from the student in runs/tiny/warm_start" in page and "Straying from the teacher" not in page
    first, last = (fewstep.load_student(p) for p in (Path("runs/tiny/warm_start/final"), Path("runs/tiny/final")))
    assert (fewstep.sample(first, PROMPTS, [1, 2]) - fewstep.sample(last, PROMPTS, [1, 2], steps=4)).abs().max() <= 1e-4
    assert (last.card.steps, last.card.condition_values) == ((4, 2, 1), (4, 2, 1))
    assert read_card(Path("runs/tiny/final")).train_seconds > first.card.train_seconds
    assert command(monkeypatch, "distill", further, *how, "--out", "runs/trained") == 0
    trained = fewstep.load_student("runs/trained/final")
    assert (
        fewstep.sample(trained, PROMPTS, [1, 2], steps=1) - fewstep.sample(last, PROMPTS, [1, 2], steps=1)
    ).abs().max() > 1e-3


def test_mistakes_are_one_line_before_anything_is_trained(
    further: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = "roles.exclude=[add_embedding, time_embedding.linear_2]"
    for options, expected in (
        (
            (bare, "data.from_student=nowhere"),
            "data.from_student: nowhere is no student folder; pass a run or its final/ folder",
        ),
        ((bare, "warm_start.data.from_student=warm_start"), "data.from_student: warm_start is no student folder"),
        (
            ("roles.exclude=[add_embedding]",),
            "init_from: this student is conditioned on 4, 2, 1 through time_embedding.linear_2, "
            "but the warm start's student has a LoRA on",
        ),
        (
            (bare, "warm_start.method.steps=[4, 3]"),
            "init_from: the warm start's student is conditioned on 4, 3, this student on 4, 2, 1; set method.steps",
        ),
        (
            (bare, "data.source=teacher"),
            "data.from_student: got warm_start with data.source=teacher; set data.source=trajectories",
        ),
    ):
        capsys.readouterr()
        assert (
            command(monkeypatch, "distill", further, *(part for option in options for part in ("--set", option))) == 2
        )
        assert expected in error_of(capsys)
        assert not Path("runs").exists()
