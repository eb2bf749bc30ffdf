"""Whole runs of students with weights of its own for each step, from Python."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.runs.recipe import DistillRecipe, validate

from .. import tiny

COPIES = pytest.mark.parametrize("lora", [True, False])


def run_of(lora: bool, out: Path, **more: Any) -> Any:
    return fewstep.distill(
        tiny.denoiser(),
        fewstep.TDM(steps=2, warmup=1),
        tiny.WORDS,
        train=fewstep.TrainConfig(iterations=4, batch=4, lr=1e-2, fake_lr=1e-2, checkpoint_every=2),
        roles=fewstep.RolesConfig(lora=lora, rank=2, per_step=True),
        out=out,
        watch=None,
        **more,
    )


@COPIES
def test_a_run_leaves_a_student_that_samples_as_its_last_step(lora: bool, tmp_path: Path) -> None:
    *_, step = run_of(lora, tmp_path / "run")
    wanted = fewstep.sample(step, tiny.WORDS)
    student = fewstep.load_student(tmp_path / "run", base=tiny.denoiser())
    assert student.card.per_step and (tmp_path / "run" / "final" / "step_2").is_dir()
    torch.testing.assert_close(fewstep.sample(student, tiny.WORDS), wanted, rtol=0, atol=1e-5)
    first, second = (step.roles.student_state(k) for k in range(2))
    assert any(not torch.equal(first[n], second[n]) for n in first)


@COPIES
def test_a_run_that_is_broken_off_ends_as_one_that_was_not(lora: bool, tmp_path: Path) -> None:
    *_, whole = run_of(lora, tmp_path / "whole")
    for _ in islice(run_of(lora, tmp_path / "broken"), 2):
        pass
    *_, again = run_of(lora, tmp_path / "broken")
    for name, p in whole.roles.trained["student"].items():
        assert torch.equal(again.roles.trained["student"][name], p)
    files = [sorted((tmp_path / r / "final").rglob("*.safetensors")) for r in ("whole", "broken")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_a_run_goes_on_from_another_ones_steps(tmp_path: Path) -> None:
    *_, before = run_of(True, tmp_path / "first")
    own = {n: v.clone() for n, v in before.roles.average.items()}
    first = next(run_of(True, tmp_path / "second", init_from=tmp_path / "first"))
    for name, p in first.roles.trained["student"].items():  # the first iteration is the fake score's
        torch.testing.assert_close(p, own[name])


def test_what_cannot_be_is_said_at_once_in_pythons_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^steps: got \[4, 2\] with per_step=True") as error:
        next(
            fewstep.distill(
                tiny.denoiser(),
                fewstep.TDM(steps=(4, 2)),
                tiny.WORDS,
                train=fewstep.TrainConfig(iterations=200),
                roles=fewstep.RolesConfig(per_step=True),
                out=tmp_path / "run",
            )
        )
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("change", "expected"), [
    ({"method": {"name": "tdm", "ladder": [16]}}, r"method\.ladder: got \[16\] with roles\.per_step=true"),
    ({"train": {"iterations": 200, "shard": True}}, r"train\.shard: got true with roles\.per_step=true"),
    ({"warm_start": {"method": {"name": "trajp-l"}, "train": {"iterations": 9}}}, r"method\.name: got trajp-l"),
])  # fmt: skip
def test_recipes_are_refused_as_they_are_read(change: dict[str, Any], expected: str) -> None:
    value = {
        "kind": "distill", "name": "x", "teacher": "emoji", "method": {"name": "tdm"}, "roles": {"per_step": True},
        "train": {"iterations": 200},
    }  # fmt: skip
    assert validate(value, DistillRecipe, "x").roles.per_step
    with pytest.raises(ValueError, match=expected):
        validate(value | change, DistillRecipe, "x")
