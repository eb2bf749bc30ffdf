"""Imitating trajectories: whose steps, whose states, who is trained; and that it learns what the closed form says."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from fewstep.api import sample_trajectory
from fewstep.backbones.base import denoiser
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.solvers import SOLVERS, Correction, Denoise, SolverHistory, sample, step
from fewstep.data.prompts import embed
from fewstep.data.trajectories import (
    Trajectories,
)
from fewstep.heads.head import KINDS
from fewstep.methods.distribution_matching import DistributionMatching, draw
from fewstep.methods.matching_settings import GanConfig
from fewstep.methods.method import TrainBatch, student_of
from fewstep.methods.presets import preset, require_roles
from fewstep.methods.trajectory_imitation import TrajectoryImitation
from fewstep.objectives.regression import REGRESSION_LOSSES
from fewstep.roles.roles import CONDITION, HEAD, Roles, RolesConfig, make_roles
from fewstep.runs.init import roles_for
from fewstep.training.loop import Step, TrainConfig, distill

from .. import tiny
from ..training.common import digest
from .common import BATCH, conditions, seed, walked


def student(method: TrajectoryImitation, paths: Trajectories, config: RolesConfig, move: float = 0.1) -> Roles:
    roles = roles_for(tiny.denoiser(), method, config, paths=paths)
    with torch.no_grad():
        for p in roles.trained["student"].values():
            p.add_(move * torch.randn(p.shape, generator=seed(p.numel())))
    return roles


def train_batch(paths: Trajectories) -> TrainBatch:
    walk = paths.draw(BATCH, seed(4), torch.device("cpu"))
    return TrainBatch(0, 9, BATCH, *conditions(tiny.denoiser()), None, seed(), walk)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp", "ipndm"])
@pytest.mark.parametrize("head", ["none", *KINDS])
def test_every_step_starts_where_the_student_is_and_meets_the_teachers_state(head: str, solver: str) -> None:
    """Each loss is a distance between the student's and the teacher's state.

    The optimizer takes no step here, so the student's states are its sampler's own.
    """
    method = TrajectoryImitation(steps=3, head=head, solver=solver)
    paths = walked(method)
    roles = student(method, paths, RolesConfig(rank=2))
    here = train_batch(paths)
    assert here.trajectories is not None
    found = list(method.losses(roles, here))
    assert [loss.role for loss in found] == ["student"] * 3
    with torch.no_grad():
        denoise = roles.denoise("student", here.trajectories.cond, 3)
        states = list(
            sample(
                denoise,
                tiny.TABLE,
                here.trajectories.states[:, 0],
                method.times(tiny.TABLE),
                SOLVERS[solver],
                roles.head,
            )
        )
    for n, (loss, state) in enumerate(zip(found, states[1:], strict=True), 1):
        torch.testing.assert_close(loss.value, REGRESSION_LOSSES["l1"](state.x, here.trajectories.states[:, n]).mean())


def test_the_gradient_of_a_step_is_its_own() -> None:
    """No backpropagation through earlier steps: the last loss has the gradient of a single step from where they led."""
    method = TrajectoryImitation(steps=3, loss="l2")
    paths = walked(method)
    roles = student(method, paths, RolesConfig(rank=2))
    here = train_batch(paths)
    assert here.trajectories is not None
    *_, last = method.losses(roles, here)
    parameters = list(roles.trained["student"].values())
    got = torch.autograd.grad(last.value, parameters)
    times, x = method.times(tiny.TABLE), here.trajectories.states[:, 0]
    past = SolverHistory(x)
    for n, (t, t_next) in enumerate(pairwise(s.expand(len(x)) for s in times)):
        with torch.set_grad_enabled(n == 2):
            x, done = step(
                SOLVERS["ddim"],
                tiny.TABLE,
                roles.denoise("student", here.trajectories.cond, 3)(x, t),
                t,
                t_next,
                past,
                roles.head,
            )
        past = SolverHistory(past.noise, (done, *past.steps))
    expected = torch.autograd.grad((x - here.trajectories.states[:, -1]).square().mean(), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_several_step_counts_meet_the_states_of_their_own_times() -> None:
    method = TrajectoryImitation(steps=(4, 2, 3))
    paths = walked(method)
    assert len(paths.times) == 7
    roles = student(method, paths, RolesConfig(rank=2), move=0.0)
    seen = set()
    for i in range(12):
        here = train_batch(paths)._replace(rng=seed(i))
        assert here.trajectories is not None
        found = list(method.losses(roles, here))
        denoise = roles.denoise("student", here.trajectories.cond, len(found))
        times = timegrid.uniform(tiny.TABLE, len(found))
        *_, last = sample(denoise, tiny.TABLE, here.trajectories.states[:, 0], times)
        torch.testing.assert_close(
            found[-1].value, REGRESSION_LOSSES["l1"](last.x, here.trajectories.states[:, -1]).mean()
        )
        seen.add(len(found))
    assert seen == {4, 2, 3}


@pytest.mark.parametrize(("name", "settings", "config", "parts"), [
    ("trajp-l", {}, RolesConfig(rank=2), {"lora", "head"}),
    ("trajp-l", {"head": "none"}, RolesConfig(rank=2), {"lora"}),
    ("pas", {}, RolesConfig(rank=0), {"head"}),
    ("sfd", {}, RolesConfig(lora=False), {"network"}),
])  # fmt: skip
def test_rivals_are_settings(name: str, settings: dict[str, Any], config: RolesConfig, parts: set[str]) -> None:
    method = preset(name, steps=2, **settings)
    assert isinstance(method, TrajectoryImitation)
    require_roles(name, config)
    paths = walked(method)
    roles = student(method, paths, config)
    names = set(roles.trained["student"])
    assert {"head" if n.startswith(HEAD) else "lora" if "lora" in n else "network" for n in names} == parts
    assert set(roles.trained) == {"student"}  # no fake score is carried along
    for loss in method.losses(roles, train_batch(paths)):
        grads = torch.autograd.grad(loss.value, list(roles.trained["student"].values()), allow_unused=True)
        assert any(g is not None and bool(g.any()) for g in grads)


def test_a_free_first_step_without_a_head_has_nothing_to_learn() -> None:
    method = TrajectoryImitation(steps=3, head="none", analytic_first_step=True)
    paths = walked(method)
    calls: list[int] = []
    roles = student(method, paths, RolesConfig(rank=2))
    roles.backbone.module.register_forward_pre_hook(lambda *_: calls.append(1))
    assert len(list(method.losses(roles, train_batch(paths)))) == 2
    assert len(calls) == 2


@pytest.mark.parametrize("head", KINDS)
def test_lora_step_count_and_head_together_change_no_bit_at_first(head: str) -> None:
    backbone, method = (
        tiny.stable_diffusion(),
        TrajectoryImitation(steps=(3, 2), head=head, guidance=Guidance(scale=1.0)),
    )
    schedule, (cond, _) = backbone.schedule, conditions(backbone, 2)
    x = torch.randn((2, *backbone.shape), generator=seed())

    def states(denoise: Denoise, steps: int, correct: Correction | None = None) -> list[torch.Tensor]:
        with torch.no_grad():
            return [s.x for s in sample(denoise, schedule, x, method.times(schedule, steps), correct=correct)]

    alone = {k: states(denoiser(backbone, backbone.module, cond), k) for k in method.counts}
    roles = roles_for(backbone, method, RolesConfig(rank=2), paths=walked(method, backbone))
    assert roles.condition_values == (3, 2)
    assert {n.split(".")[0] for n in roles.trained["student"]} >= {"head", CONDITION, "down_blocks"}
    for k, wanted in alone.items():
        assert all(
            torch.equal(a, b)
            for a, b in zip(states(student_of(method, roles, cond, k), k, roles.head), wanted, strict=True)
        )


@pytest.mark.parametrize(
    "config", [RolesConfig(rank=2), RolesConfig(rank=0), RolesConfig(lora=False)], ids=["lora", "head", "copy"]
)
def test_imitation_leaves_the_teacher_as_it_was(config: RolesConfig) -> None:
    method = TrajectoryImitation(steps=(3, 2))
    paths = walked(method)
    roles = student(method, paths, config, move=0.0)
    data, before = embed(roles.backbone, tiny.WORDS, None, ""), digest(roles.networks["teacher"])
    for _ in distill(roles, method, data, TrainConfig(iterations=3, batch=4, lr=1e-2, fake_lr=1e-2), paths=paths):
        pass
    assert digest(roles.networks["teacher"]) == before == digest(tiny.denoiser().module)
    start = student(method, paths, config, move=0.0).trained["student"]
    assert all(not torch.equal(p, start[n]) for n, p in roles.trained["student"].items() if "lora_A" not in n)


def test_head_without_lora_leaves_the_network_out_of_the_graph() -> None:
    method = TrajectoryImitation(steps=2)
    paths = walked(method)
    roles = student(method, paths, RolesConfig(rank=0))
    assert not any(p.requires_grad for p in roles.backbone.module.parameters())
    assert all(n.startswith(HEAD) for n in roles.trained["student"])
    with pytest.raises(ValueError, match=r"roles.rank: got 0, which trains a head alone"):
        make_roles(tiny.denoiser(), RolesConfig(rank=0))


@pytest.mark.parametrize("free", [False, True])
def test_a_head_goes_along_into_distribution_matching(free: bool) -> None:
    """A matched student's rollout with a head is its sampler's.

    Its landing state carries the head's gradient, from a free first step too.
    """
    paths = walked(TrajectoryImitation(steps=4))
    roles = student(TrajectoryImitation(steps=4), paths, RolesConfig(rank=2))
    cond, _ = conditions(roles.backbone)
    method = DistributionMatching(steps=4, analytic_first_step=free)
    d = draw(method, roles, cond, BATCH, seed(), with_gradient=True)
    assert set(d.segment.tolist()) == {0, 1, 2, 3}
    rng = seed()
    noise = torch.randn((BATCH, *roles.backbone.shape), generator=rng)
    with torch.no_grad():
        denoise = student_of(method, roles, cond)
        states = list(sample(denoise, tiny.TABLE, noise, timegrid.uniform(tiny.TABLE, 4), SOLVERS["ddim"], roles.head))
    for i, k in enumerate(d.segment.tolist()):
        torch.testing.assert_close(d.x_m[i], states[k + 1].x[i], atol=1e-5, rtol=1e-5)
    assert roles.head is not None
    grads = torch.autograd.grad(d.x_m[d.segment == 0].square().sum(), list(roles.head.parameters()), allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in grads)


def test_a_step_of_training_is_not_sampled_in_more_steps_than_its_head_serves() -> None:
    method = TrajectoryImitation(steps=3)
    step = Step(1, {}, 0.0, student(method, walked(method), RolesConfig(rank=2)), method)
    assert len(sample_trajectory(step, ["red cat"], steps=2)) == 3
    with pytest.raises(
        ValueError, match=r"^steps: got 4, the student's span head serves up to 3 steps; take as many or fewer"
    ):
        sample_trajectory(step, ["red cat"], steps=4)


@pytest.mark.parametrize(("settings", "expected"), [
    ({"head": "mlp"}, "head: got 'mlp', allowed are none, span, curve, shared"),
    ({"solver": "renoise"}, "solver: got 'renoise', allowed are ddim, dpmpp, ipndm"),
    ({"steps": 0}, "steps: got 0"),
    ({"loss": "l3"}, "loss: got 'l3', allowed are l1, l2, huber"),
    ({"steps": (2, 1), "analytic_first_step": True}, "analytic_first_step: got True for a student of 1 step"),
])  # fmt: skip
def test_settings_that_cannot_be(settings: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        TrajectoryImitation(**settings)


# The same states as an anchor of distribution matching


def anchored(anchor: float, rank: int = 2) -> tuple[list[torch.Tensor], float, Roles, TrainBatch]:
    """Gradient and anchor of the student's update from fixed states of the teacher."""
    method = DistributionMatching(steps=3, regression_weight=anchor, warmup=0, guidance=Guidance(scale=1.0))
    paths = walked(TrajectoryImitation(steps=3))
    roles, here = make_roles(tiny.denoiser(), RolesConfig(rank=rank)), train_batch(paths)
    if not anchor:
        here = here._replace(trajectories=None)
    *_, last = method.losses(roles, here)
    found = torch.autograd.grad(last.value, list(roles.trained["student"].values()))
    return list(found), float(last.metrics.get("regression_loss", 0.0)), roles, here


def test_an_anchor_is_the_distance_of_every_landing_state_to_the_teachers_trajectory() -> None:
    """With equal roles and no guidance matching has no gradient: what is left is the anchor's, weighted."""
    nothing, none, _, _ = anchored(0.0)
    once, value, roles, here = anchored(1.0)
    twice, same, _, _ = anchored(2.0)
    assert none == 0
    assert not any(bool(g.any()) for g in nothing)
    assert any(bool(g.any()) for g in once)
    assert value == same
    torch.testing.assert_close([2 * g for g in once], twice)
    assert here.trajectories is not None
    method = DistributionMatching(steps=3)
    segment = draw(
        method, roles, here.trajectories.cond, BATCH, seed(), False, init_noise=here.trajectories.states[:, 0]
    ).segment
    with torch.no_grad():
        states = list(
            sample(
                roles.denoise("student", here.trajectories.cond, 3),
                tiny.TABLE,
                here.trajectories.states[:, 0],
                method.times(tiny.TABLE),
            )
        )
    rows = range(BATCH)
    far = [
        (states[n + 1].x[i] - here.trajectories.states[i, n + 1]).abs().mean()
        for i, n in zip(rows, segment.tolist(), strict=True)
    ]
    assert value == pytest.approx(float(torch.stack(far).mean()), rel=1e-5)


@pytest.mark.parametrize("settings", [{"solver": "renoise"}, {"gan": GanConfig(weight=1.0)}])
def test_an_anchor_wants_a_deterministic_solver_and_the_recipes_only_data(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^regression_weight: got"):
        DistributionMatching(regression_weight=0.5, **settings)
