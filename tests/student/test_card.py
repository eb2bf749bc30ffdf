"""`fewstep.json` as fewstep 0.1.0 wrote it, format 1, and as it is written now."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.atomic import write_json
from fewstep.core.guidance import Guidance
from fewstep.methods.method import Method
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.student.card import StudentCard
from fewstep.student.folder import FILE, read_card
from fewstep.student.student import Origin, Student

from .. import tiny
from .card import CARD

PROMPTS = ["red cat", "blue dog"]
GUIDANCE = Guidance(scale=3.0, apg_eta=0.4, rescale=0.7)
# Written by fewstep 0.1.0, but for the name of its base: `TDM(steps=(4, 2), guidance=3.0, guidance_parallel=0.4,
# free_first=True)` on a teacher with `guidance_rescale=0.7`.
WRITTEN = """{
  "name": "base-tdm-unify-2-4step",
  "method": "tdm-unify",
  "base": "me/base",
  "base_hash": "45bcde508fef85b8",
  "steps": [4, 2],
  "timesteps": {"4": [999.0, 749.0, 499.0, 249.0, -1.0], "2": [999.0, 499.0, -1.0]},
  "solver": {"4": "ddim", "2": "ddim"},
  "prediction": "v_prediction",
  "weights": "lora",
  "rank": 2,
  "alpha": 2.0,
  "teacher_guidance": 3.0,
  "licence": "other",
  "iterations": 2,
  "train_seconds": 0.7224845149976318,
  "hardware": "1 CPU threads",
  "version": "0.1.0",
  "guidance": "baked",
  "guidance_rescale": 0.7,
  "guidance_parallel": 0.4,
  "head": "",
  "free_first": true,
  "scales": [],
  "dtype": "float32",
  "size": 0,
  "data": "prompts alone",
  "files": {
    "pytorch_lora_weights.safetensors": "f098f58e3543c8f25d4a49f7f1a825065e8a11773c45f8926716df6f72767139",
    "step_condition.safetensors": "3bda1ed7f3d4d7964982005b9b52ccfb3e6cb3ede877643661bb2484b72080d2"
  },
  "time_layer": "time_embedding.linear_2",
  "own_network": "",
  "sigma_data": 0.0,
  "schedule": {},
  "shape": [],
  "conditions": {},
  "format": 1
}"""


def format_1(card: StudentCard) -> dict[str, Any]:
    """What fewstep 0.1.0 wrote of this student. Of the teacher's guidance it said neither a tilt nor a stop."""
    assert (card.guidance.tilt, card.guidance.stop) == (0, 0)
    new = ("guidance", "analytic_first_step", "guidance_scales", "per_step", "format")
    return {k: v for k, v in asdict(card).items() if k not in new} | {
        "teacher_guidance": card.guidance.scale,
        "guidance": "baked",
        "guidance_rescale": card.guidance.rescale,
        "guidance_parallel": card.guidance.apg_eta,
        "free_first": card.analytic_first_step,
        "scales": card.guidance_scales,
        "format": 1,
    }


def written(folder: Path, method: Method) -> Student:
    """A student of this method with random weights, written; it is shown on the networks that it was made on."""
    roles = make_roles(tiny.stable_diffusion(), RolesConfig(rank=2), condition_values=method.condition_values)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in roles.trained["student"].values():
            p.add_(torch.randn(p.shape, generator=rng) / 20)
    student = Student.of(roles, method, Origin("tiny", "", 7, 1.0, method.name))
    student.write(folder)
    return student


def drawn(model: Student, how: dict[str, Any]) -> Tensor:
    return fewstep.sample(model, PROMPTS, [0, 1], **how)


def test_a_card_of_format_1_is_one_of_today(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(WRITTEN, encoding="utf-8")
    assert read_card(tmp_path) == StudentCard(
        name="base-tdm-unify-2-4step",
        method="tdm-unify",
        base="me/base",
        base_hash="45bcde508fef85b8",
        steps=(4, 2),
        timesteps={"4": [999, 749, 499, 249, -1], "2": [999, 499, -1]},
        solver={"4": "ddim", "2": "ddim"},
        prediction="v_prediction",
        weights="lora",
        rank=2,
        alpha=2.0,
        guidance=GUIDANCE,
        licence="other",
        iterations=2,
        train_seconds=0.7224845149976318,
        hardware="1 CPU threads",
        version="0.1.0",
        analytic_first_step=True,
        files=json.loads(WRITTEN)["files"],
        time_layer="time_embedding.linear_2",
        format=2,
    )
    old = set(json.loads(WRITTEN))
    assert set(format_1(CARD)) == old


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        (
            fewstep.TDM(steps=(4, 2), warmup=0, guidance=GUIDANCE, analytic_first_step=True),
            [{"steps": 4}, {"steps": 2}],
        ),
        (fewstep.method("lcm", guidance=2.0, guidance_scales=(5.0,)), [{"guidance": 2.0}, {"guidance": 5.0}]),
    ],
    ids=["step counts", "guidance scales"],
)
def test_a_student_of_format_1_draws_what_it_drew(method: Method, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    """Read by fewstep, as a pipeline, and written again."""
    student = written(tmp_path / "final", method)
    card = read_card(tmp_path / "final")
    write_json(tmp_path / "final" / FILE, format_1(card))
    assert json.loads((tmp_path / "final" / FILE).read_text(encoding="utf-8"))["format"] == 1
    old = fewstep.load_student(tmp_path / "final", tiny.stable_diffusion())
    assert old.card == card and old.card.format == 2
    pipe = fewstep.load(tiny.pipeline(), tmp_path / "final")
    old.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / FILE).read_text(encoding="utf-8"))["format"] == 2
    again = fewstep.load_student(tmp_path / "again", tiny.stable_diffusion())
    assert replace(again.card, files={}) == replace(card, files={})
    found = []
    for how in calls:
        wanted = drawn(student, how)
        found.append(wanted)
        for model in (old, again):
            torch.testing.assert_close(drawn(model, how), wanted, rtol=0, atol=1e-4)
        options = {"num_inference_steps": how["steps"]} if "steps" in how else {"guidance_scale": how["guidance"]}
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        images = pipe(PROMPTS, generator=generators, output_type="pt", **options).images
        torch.testing.assert_close(images, wanted, rtol=0, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("number", [0, 3, "1", True, None, 1.0])
def test_other_formats_are_refused(number: object, tmp_path: Path) -> None:
    write_json(tmp_path / FILE, asdict(CARD) | {"format": number})
    with pytest.raises(
        ValueError, match=r"has format \S+, this version reads 1 and 2; install the fewstep that wrote it$"
    ):
        read_card(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher_guidance": "3"}, "guidance.scale is '3', not a number"),
        ({"guidance_rescale": 2.0}, "guidance.rescale: got 2.0"),
        ({"scales": 3}, "guidance_scales is 3, not a list"),
        ({"tilt": 1.0}, "it has tilt, which nothing here is called"),
    ],
)
def test_values_of_format_1_that_no_student_has_are_refused(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    write_json(tmp_path / FILE, json.loads(WRITTEN) | change)
    with pytest.raises(
        ValueError, match=rf"^student: .*fewstep\.json does not fit format 1 \({said}.*\); export the run again$"
    ):
        read_card(tmp_path)
