"""Consistency and progressive distillation: what is compared with what, and who keeps the stage before."""

from dataclasses import replace

import pytest
import torch

from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import diffuse
from fewstep.core.solvers import ddim_step
from fewstep.methods.consistency import ConsistencyDistillation, consistency_loss
from fewstep.methods.method import RealBatch, TrainBatch
from fewstep.methods.presets import preset
from fewstep.methods.progressive import ProgressiveDistillation, progressive_loss, stage_of
from fewstep.objectives.regression import REGRESSION_LOSSES, consistency_function
from fewstep.roles.roles import Roles, RolesConfig, make_roles

from .. import tiny
from .common import BATCH, conditions, gradients, seed, trained

PROGRESSIVE = ProgressiveDistillation(loss="l2", solver="ddim", name="progressive", stages=3, steps=2)


def train_batch(roles: Roles, iteration: int = 0, iterations: int = 9) -> TrainBatch:
    cond, null = conditions(roles.backbone)
    images = RealBatch(torch.randn((BATCH, *roles.backbone.shape), generator=seed(5)), cond)
    return TrainBatch(iteration, iterations, BATCH, cond, null, images, seed())


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["lcm", "progressive"])
def test_only_the_student_is_trained(name: str, share: bool) -> None:
    roles = trained(share)
    (loss,) = preset(name).losses(roles, train_batch(roles, iteration=8))
    assert loss.role == "student"
    assert any(g is not None and bool(g.any()) for g in gradients(loss.value, roles, "student"))
    assert not any(g is not None for g in gradients(loss.value, roles, "fake"))


@pytest.mark.parametrize("metric", REGRESSION_LOSSES)
def test_consistency_is_its_formula(metric: str) -> None:
    """The goal is the average's, one guided teacher step further. The student's own weights do not change."""
    roles, method = trained(), ConsistencyDistillation(steps=5, loss=metric, solver_steps=10)
    here = train_batch(roles)
    assert here.images is not None
    x_0, cond = here.images
    times, rng = timegrid.uniform(tiny.TABLE, 10), seed()
    n = torch.randint(10, (BATCH,), generator=rng)
    t, s = times[n], times[n + 1]
    x_t = diffuse(tiny.TABLE, x_0, t, torch.randn(x_0.shape, generator=rng))
    with torch.no_grad():
        x_s = ddim_step(tiny.TABLE, roles.teacher(cond, here.null, Guidance(scale=3.5))(x_t, t), s)
        own = consistency_function(x_t, roles.denoise("student", cond)(x_t, t).x0, t, -1.0)
        current = roles.denoise("student", cond)(x_s, s.clamp(min=0)).x0
        with roles.averaged():
            average = roles.denoise("student", cond)(x_s, s.clamp(min=0)).x0
        assert not torch.allclose(average, current)
    expected = REGRESSION_LOSSES[metric](own, consistency_function(x_s, average, s, -1.0)).mean()
    torch.testing.assert_close(consistency_loss(method, roles, here), expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_a_consistent_student_is_trained_at_the_times_it_is_asked_for(steps: int, shift: float) -> None:
    method = ConsistencyDistillation(steps=steps, shift=shift)
    trained_at = timegrid.uniform(tiny.TABLE, method.solver_steps, shift)
    assert set(method.times(tiny.TABLE).tolist()) <= set(trained_at.tolist())


def test_the_last_consistency_goal_is_the_teachers_clean_state() -> None:
    """Where the next time is clean data, the network is not asked: its answer counts for nothing."""
    roles, method = trained(), ConsistencyDistillation(steps=1, solver_steps=1)
    before = consistency_loss(method, roles, train_batch(roles)).item()
    roles.average.update({n: a + 1 for n, a in roles.average.items()})
    assert consistency_loss(method, roles, train_batch(roles)).item() == before


def test_a_perfect_student_of_a_straight_path_has_no_consistency_loss() -> None:
    """A teacher that always says 0: every path leads to 0 and the student that says 0 is consistent."""
    roles = make_roles(tiny.denoiser(prediction="x0"), RolesConfig(lora=False))
    with torch.no_grad():
        for network in roles.networks.values():
            for p in network.parameters():
                p.zero_()
        for a in roles.average.values():
            a.zero_()
    assert consistency_loss(ConsistencyDistillation(), roles, train_batch(roles)).item() < 1e-4


def test_stages_are_of_equal_length_and_begin_once() -> None:
    found = [stage_of(PROGRESSIVE, i, 9) for i in range(9)]
    assert [s for s, _ in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [i for i, (_, begins) in enumerate(found) if begins] == [3, 6]
    assert [stage_of(PROGRESSIVE, i, 2) for i in range(2)] == [(0, False), (1, True)]


def test_one_step_lands_where_two_of_the_stage_before_land() -> None:
    roles = trained()
    here = train_batch(roles)
    assert here.images is not None
    x_0, cond = here.images
    fine, rng = (
        timegrid.uniform(tiny.TABLE, 16),
        seed(),
    )  # two steps at the end, four stages of halving above: 8 of the student
    segment = timegrid.draw_segments(BATCH, 8, rng)
    high, middle, low = (fine[2 * segment + i] for i in range(3))
    x = diffuse(tiny.TABLE, x_0, high, torch.randn(x_0.shape, generator=rng))
    with torch.no_grad():
        teacher = roles.teacher(cond, here.null, Guidance(scale=3.5))
        x_middle = ddim_step(tiny.TABLE, teacher(x, high), middle)
        x_low = ddim_step(tiny.TABLE, teacher(x_middle, middle), low)
        split = roles.denoise("student", cond)(x, high)
        landed = ddim_step(tiny.TABLE, split, low)
    loss = progressive_loss(replace(PROGRESSIVE, snr_clip=1e-9), roles, here)
    factor = tiny.TABLE.alpha(low) - tiny.TABLE.sigma(low) / tiny.TABLE.sigma(high) * tiny.TABLE.alpha(high)
    expected = ((landed - x_low).square().flatten(1).mean(1) / factor**2).mean() * 1e-9
    torch.testing.assert_close(loss, expected.float(), rtol=1e-3, atol=0)


def test_the_next_stage_imitates_the_average_as_it_was() -> None:
    roles = trained()
    frozen = {n: a.clone() for n, a in roles.average.items()}
    list(PROGRESSIVE.losses(roles, train_batch(roles, 3)))  # the second stage begins
    assert all(torch.equal(p, a) for p, a in zip(roles.trained["fake"].values(), frozen.values(), strict=True))
    with torch.no_grad():
        for a in roles.average.values():
            a.add_(1.0)
    list(PROGRESSIVE.losses(roles, train_batch(roles, 4)))  # and goes on
    assert all(torch.equal(p, a) for p, a in zip(roles.trained["fake"].values(), frozen.values(), strict=True))


@pytest.mark.parametrize("name", ["lcm", "progressive"])
def test_the_teacher_is_asked_without_the_parallel_part(name: str) -> None:
    roles = trained()
    plain, projected = (
        next(iter(preset(name, guidance=Guidance(scale=3.5, apg_eta=p)).losses(roles, train_batch(roles)))).value
        for p in (1.0, 0.0)
    )
    assert not torch.allclose(plain, projected)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (
            ConsistencyDistillation,
            {"steps": 3, "solver_steps": 50},
            "solver_steps: got 50, allowed are multiples of steps (3)",
        ),
        (ConsistencyDistillation, {"solver_steps": 0}, "solver_steps: got 0, allowed"),
        (ProgressiveDistillation, {"stages": 0}, "stages: got 0, allowed"),
        *(
            (kind, settings, expected)
            for kind in (ConsistencyDistillation, ProgressiveDistillation)
            for settings, expected in (
                ({"steps": 0}, "steps: got 0, allowed are whole numbers from 1"),
                ({"steps": (4, 2)}, "steps: got [4, 2], method "),
                ({"loss": "l3"}, "loss: got 'l3', allowed are l1, l2, huber"),
                ({"shift": 0.0}, "shift: got 0.0, allowed are numbers above 0"),
                ({"guidance": float("inf")}, "guidance.scale: got inf, allowed are numbers"),
            )
        ),
    ],
)
def test_settings_that_cannot_be(kind: type, settings: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        kind(**settings)
    assert str(error.value).startswith(expected)


def test_names() -> None:
    assert preset("lcm") == ConsistencyDistillation()
    assert preset("progressive", stages=3, steps=2) == PROGRESSIVE
    with pytest.raises(ValueError, match=r"name: got 'dmd3', allowed are tdm, tdm-unify"):
        preset("dmd3")
