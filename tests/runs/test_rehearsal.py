"""A student's files before there is a student, of every kind of student; and the bytes of a run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.backbones.base import Backbone
from fewstep.backbones.load import around, at_size, fingerprint
from fewstep.backbones.parts import frozen
from fewstep.core.guidance import Guidance
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.methods.trajectory_imitation import TrajectoryImitation
from fewstep.roles.roles import RolesConfig
from fewstep.runs.rehearsal import STUDENTS, Trial, student_check, trial_of
from fewstep.student.student import Origin
from fewstep.training.loop import TrainConfig

from .. import tiny

METHOD = DistributionMatching(steps=2, warmup=1, guidance=Guidance(scale=2.0))


def trial(
    teacher: Backbone, method: Any = METHOD, config: TrainConfig | None = None, size: int = 0, **roles: Any
) -> Trial:
    base_hash = fingerprint(teacher.module)
    return trial_of(
        teacher,
        method,
        RolesConfig(**roles),
        config or TrainConfig(iterations=1, batch=2, lr=1e-4, fake_lr=1e-4),
        Origin("tiny", base_hash, 0, 0.0, "tdm", size=size),
    )


@pytest.mark.parametrize(
    ("teacher", "method", "roles"),
    [
        (tiny.stable_diffusion, METHOD, {"rank": 2}),
        (tiny.stable_diffusion, METHOD, {"rank": 2, "alpha": 1.0}),
        (tiny.stable_diffusion, METHOD, {"lora": False}),
        (tiny.stable_diffusion, DistributionMatching(steps=(4, 2, 1), guidance=Guidance(scale=2.0)), {"rank": 2}),
        (tiny.stable_diffusion, DistributionMatching(steps=(4, 2, 1), guidance=Guidance(scale=2.0)), {"lora": False}),
        (tiny.stable_diffusion, TrajectoryImitation(steps=2, head="span", guidance=Guidance(scale=2.0)), {"rank": 2}),
        (tiny.stable_diffusion, TrajectoryImitation(steps=2, head="span", guidance=Guidance(scale=2.0)), {"rank": 0}),
        (tiny.denoiser, METHOD, {"rank": 2}),
        (tiny.denoiser, METHOD, {"lora": False}),
    ],
)
def test_every_kind_of_student_is_rehearsed(teacher: Any, method: Any, roles: dict[str, Any], tmp_path: Path) -> None:
    model = teacher()
    before = {n: p.clone() for n, p in model.module.state_dict().items()}
    check = student_check(trial(model, method, **roles), tmp_path / "trial")
    assert check.holds and "largest difference" in check.said, check
    assert not list(tmp_path.iterdir())
    after = model.module.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(before[n], after[n]) for n in before
    )  # the teacher is as it was


def test_images_of_another_size_are_rehearsed_small(tmp_path: Path) -> None:
    """Both students of a trial have the small size, whatever the recipe's is."""
    own = tiny.stable_diffusion()
    model = at_size(own, 4 * own.small * own.pixels)
    assert model.shape[-1] > own.small
    made = trial(model, size=model.image_size, rank=2)
    assert made.student.backbone.shape[-1] == own.small
    check = student_check(made, tmp_path / "trial")
    assert check.holds and "largest difference" in check.said, check


def test_half_precision_too(tmp_path: Path) -> None:
    model = around(frozen(tiny.pipeline(), torch.bfloat16), "tiny")
    assert student_check(trial(model, rank=2), tmp_path / "trial").holds


def test_a_student_that_draws_otherwise_than_its_files_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trial(tiny.stable_diffusion(), rank=4)
    other = trial(tiny.stable_diffusion(seed=1), rank=4).student
    monkeypatch.setattr("fewstep.runs.rehearsal.Student.read", lambda place, base: other)
    check = student_check(made, tmp_path / "trial")
    assert not check.holds and "do not hold all" in check.cure


@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_bytes_are_those_that_a_run_leaves(share: bool, tmp_path: Path) -> None:
    """Counted against the files: a checkpoint, and the student's weights."""
    teacher, config = tiny.stable_diffusion(), TrainConfig(iterations=2, batch=2, lr=1e-4, fake_lr=1e-4)
    disk = trial(teacher, METHOD, config, lora=share, rank=4).disk
    steps = fewstep.distill(
        teacher,
        METHOD,
        tiny.WORDS,
        train=fewstep.TrainConfig(iterations=2, batch=2),
        roles=fewstep.RolesConfig(rank=4, lora=share),
        out=tmp_path / "run",
        watch=None,
    )
    list(steps)

    def size(folder: Path) -> int:
        return sum(p.stat().st_size for p in folder.rglob("*.safetensors"))

    checkpoint = size(max((tmp_path / "run").glob("checkpoint-*")))
    left = (config.keep + 1) * checkpoint + STUDENTS * size(tmp_path / "run" / "final")
    assert 0.85 * left < disk < 1.15 * left


def test_a_training_from_python_looks_before_it_begins(tmp_path: Path) -> None:
    """One line, in Python's words, and nothing is left; a teacher that draws nothing is not distilled."""
    teacher = tiny.stable_diffusion()
    with torch.no_grad():
        for p in teacher.pipe.vae.decoder.conv_out.parameters():
            p.zero_()
    with pytest.raises(ValueError, match=r"^teacher: tiny: its images are one colour"):
        next(
            fewstep.distill(teacher, METHOD, tiny.WORDS, train=fewstep.TrainConfig(iterations=2), out=tmp_path / "run")
        )
    assert not list(tmp_path.rglob("*.safetensors"))


def test_trajectories_that_have_no_room_are_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(".")._replace(free=100)
    monkeypatch.setattr("fewstep.atomic.shutil.disk_usage", lambda path: full)
    paths = fewstep.TrajectoryConfig(count=40, steps=4, folder=str(tmp_path / "walked"))
    with pytest.raises(OSError, match=r"walked/trajectories.json: it takes .* are free there"):
        next(
            fewstep.distill(
                tiny.denoiser(),
                TrajectoryImitation(steps=2),
                tiny.WORDS,
                train=fewstep.TrainConfig(iterations=1),
                trajectories=paths,
            )
        )
    assert not list(tmp_path.rglob("*.safetensors"))
