"""What a run shows says what it cost, and whether it is what the teacher shows."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from fewstep.backbones.base import Backbone
from fewstep.cli.distill import drawing_of
from fewstep.core.guidance import Guidance
from fewstep.core.solvers import State
from fewstep.data.prompts import embed
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.methods.method import Method
from fewstep.methods.trajectory_imitation import TrajectoryImitation
from fewstep.report.grids import draw_grid
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.runs import preview
from fewstep.runs.preview import Drawing, Preview, labelled
from fewstep.runs.recipe import DistillRecipe
from fewstep.training.monitor import drift

from .. import tiny
from ..cli.common import RECIPE


@pytest.mark.parametrize(
    ("labels", "guidance", "first"),
    [
        (("cat", "dog"), 2.0, "teacher, 3 guided steps (6 evaluations)"),
        (("cat", "dog"), 1.0, "teacher, 3 steps (3 evaluations)"),
        ((), 2.0, "teacher, 3 steps (3 evaluations)"),
    ],
)
def test_images_say_their_network_evaluations(labels: tuple[str, ...], guidance: float, first: str) -> None:
    """A guided step is two, one that leaves the network out is none; without classes there is nothing to guide."""
    method = TrajectoryImitation(
        steps=(4, 2), analytic_first_step=True, head="none", condition=False, guidance=Guidance(scale=guidance)
    )
    recipe = DistillRecipe.model_validate({**RECIPE, "method": {"name": "trajp-l", "guidance": guidance}})
    teacher = tiny.pixels(labels)
    shown = embed(teacher, labels or [""], None, "x")
    images = Preview(drawing_of(recipe), teacher, shown, None).compare(
        make_roles(teacher, RolesConfig(rank=2), fake=False), method
    )
    step = "unguided step" if "guided" in first else "step"
    assert list(images.rows) == [
        first,
        f"teacher, 4 {step}s (4 evaluations)",
        "student, 4 steps (3 evaluations)",
        f"teacher, 2 {step}s (2 evaluations)",
        "student, 2 steps (1 evaluation)",
    ]
    assert list(images.trajectories) == [labelled("teacher", "step", 4), labelled("student", "step", 4)]


def drawn(
    method: Mapping[str, Any], teacher: Backbone, labels: tuple[str, ...] = ("cat", "dog", "cat")
) -> tuple[Preview, Roles]:
    """The previews of a method, and what it trains, untrained."""
    recipe = DistillRecipe.model_validate(
        {**RECIPE, "method": method, "train": {**RECIPE["train"], "iterations": 101, "batch": 2}}
    )
    roles = make_roles(
        teacher, RolesConfig(rank=2), condition_values=recipe.method.condition_values, fake=recipe.method.needs.fake
    )
    return Preview(drawing_of(recipe), teacher, embed(teacher, labels, None, "x"), None), roles


def rows_shown(shown: Preview, roles: Roles, monkeypatch: pytest.MonkeyPatch, to: Path) -> dict[str, torch.Tensor]:
    """What the grid of one preview holds."""
    seen: dict[str, torch.Tensor] = {}

    def keep(images: torch.Tensor, labels: list[str], prompts: list[str]) -> Image.Image:
        seen.update(zip(labels, images, strict=True))
        return draw_grid(images, labels, prompts)

    monkeypatch.setattr(preview, "draw_grid", keep)
    shown.folder = to
    shown.show(roles, 1, shown.drawing.method)
    return seen


def test_teacher_and_fake_score_estimate_the_same_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without guidance all three roles are one network; with it the teacher's estimates are others."""
    rows = rows_shown(*drawn({"steps": 4, "guidance": 1.0}, tiny.pixels()), monkeypatch, tmp_path)
    assert list(rows)[2:] == ["estimate of the student", "estimate of the teacher", "estimate of the fake score"]
    assert torch.equal(rows["estimate of the teacher"], rows["estimate of the fake score"])
    assert not torch.equal(rows["estimate of the student"], rows["estimate of the fake score"])
    rows = rows_shown(*drawn({"steps": 4, "guidance": 4.0}, tiny.pixels()), monkeypatch, tmp_path)
    assert not torch.equal(rows["estimate of the teacher"], rows["estimate of the fake score"])


def test_methods_without_a_fake_score_show_no_estimates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    method = {"name": "trajp-l", "steps": 2, "head": "none", "guidance": 2.0}
    assert list(rows_shown(*drawn(method, tiny.pixels()), monkeypatch, tmp_path)) == [
        "teacher, 3 steps",
        "student, 2 steps",
    ]


def test_every_step_count_is_judged_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one being well says nothing of the others."""
    shown, roles = drawn({"name": "tdm-unify", "steps": [4, 1], "guidance": 2.0}, tiny.pixels())
    method = shown.drawing.method
    assert (
        shown.show(roles, 1, method).warnings == []
    )  # a student that has not moved has not drifted, blurred as one step is
    whole = Preview._student

    def broken(self: Preview, roles: Roles, method: Method, steps: int) -> list[State]:
        states = whole(self, roles, method, steps)
        return states if steps == 4 else [s._replace(x=s.x * float("nan")) for s in states]

    monkeypatch.setattr(Preview, "_student", broken)
    said = shown.show(roles, 1, method)
    assert said.warnings and all(" in 1 step;" in line for line in said.warnings)
    assert any("3 of 3 previews are of one colour or not finite" in line for line in said.warnings)
    assert said.distances[4] > 0 and said.distance != said.distance


def test_a_teacher_that_guidance_blows_out_is_said_before_the_training() -> None:
    teacher = tiny.stable_diffusion()
    shown, roles = drawn({"steps": 4, "guidance": 80.0}, teacher, ("red cat", "blue dog"))
    first = shown.show(roles, 0, shown.drawing.method).warnings
    assert any(
        "DRIFT spread is " in line and "the teacher's own previews at method.guidance=80" in line for line in first
    )
    moderate, roles = drawn({"steps": 4, "guidance": 4.5}, teacher, ("red cat", "blue dog"))
    assert moderate.show(roles, 0, moderate.drawing.method).warnings == []
    assert moderate.moderate is None and shown.moderate is not None


def test_the_distance_of_the_teacher_to_itself_is_none() -> None:
    shown, roles = drawn({"steps": 3, "guidance": 1.0, "solver": "ddim"}, tiny.pixels())
    assert shown.show(roles, 1, shown.drawing.method).distance == pytest.approx(
        0, abs=1e-3
    )  # as many steps, the same network


@pytest.mark.parametrize(("steps", "expected"), [(4, "teacher, 2 guided steps (4 evaluations)"), (1, None)])
def test_the_report_shows_the_teacher_s_other_way_to_spend_the_student_s_calls(
    steps: int, expected: str | None
) -> None:
    shown, roles = drawn({"steps": steps, "guidance": 2.0}, tiny.pixels())
    rows = list(shown.compare(roles, shown.drawing.method).rows)
    assert [r for r in rows[1:] if " guided " in r] == ([expected] if expected else [])


def test_clips_are_judged_by_their_motion() -> None:
    """A strip of a few frames is shown; what moves is measured on all of them."""
    shown, _ = drawn({"steps": 2, "guidance": 1.0}, tiny.pixels())
    moving = torch.rand(2, 9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shown.teacher = SimpleNamespace(decode=lambda x: x)
    images, teacher = shown._looked(moving)
    assert images.shape == (2, 3, 8, 5 * 8) and teacher.motion == pytest.approx(float(moving.diff(dim=1).abs().mean()))
    still = shown._looked(moving[:, :1].expand_as(moving))[1]
    assert any("2 of 2 clips stand still" in line for line in drift(still, teacher))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_networks_compute_in_the_training_s_precision_and_the_decoder_as_ever(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bool]] = {"network": set(), "decoder": set()}
    teacher = tiny.stable_diffusion()
    roles = make_roles(teacher, RolesConfig(rank=2))
    teacher.module.register_forward_pre_hook(lambda *_: seen["network"].add(torch.is_autocast_enabled("cpu")))
    teacher.pipe.vae.decoder.register_forward_pre_hook(lambda *_: seen["decoder"].add(torch.is_autocast_enabled("cpu")))
    method = DistributionMatching(steps=2)
    drawing = Drawing(method, 2, teacher_steps=2, precision=precision)  # type: ignore[arg-type]
    shown = Preview(drawing, teacher, embed(teacher, tiny.WORDS, None, "x"), None)
    shown.show(roles, 1, method)
    shown.compare(roles, method)
    assert seen == {"network": {precision == "bf16"}, "decoder": {False}}
    assert {layer.cast_input_dtype_enabled for layer in roles.layers} <= {True}
