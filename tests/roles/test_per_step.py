"""Weights of its own for each step: each sample is served, and trained, by those of its step alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.core import timegrid
from fewstep.core.prediction import Split
from fewstep.core.schedule import EDM, Flow
from fewstep.core.solvers import Denoise
from fewstep.data.prompts import embed
from fewstep.methods.distribution_matching import DistributionMatching, draw, matching_losses
from fewstep.methods.matching_settings import FakeScoreConfig, RewardConfig
from fewstep.methods.method import Method, TrainBatch, student_of
from fewstep.methods.per_step import require_per_step
from fewstep.methods.presets import preset
from fewstep.roles.per_step import by_step, step_name
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.runs.init import roles_for
from fewstep.runs.recipe import DistillRecipe, read_recipe
from fewstep.training.loop import Reach, Step, TrainConfig, distill
from fewstep.training.settings import require_unchanged, settings_of

from .. import tiny
from .common import perturb

METHOD = DistributionMatching(steps=4, warmup=1)
COPIES = pytest.mark.parametrize("lora", [True, False])


def apart(lora: bool = True, backbone: Backbone | None = None, **more: object) -> Roles:
    config = RolesConfig(lora=lora, rank=2, per_step=True, **more)  # type: ignore[arg-type]
    return roles_for(backbone or tiny.denoiser(), METHOD, config)


def one(lora: bool = True, backbone: Backbone | None = None) -> Roles:
    return roles_for(backbone or tiny.denoiser(), METHOD, RolesConfig(lora=lora, rank=2))


def conditions(roles: Roles, count: int = 8) -> dict[str, Tensor]:
    return dict(roles.backbone.encode([tiny.WORDS[i % 3] for i in range(count)]))


def batch_of(roles: Roles, count: int = 8) -> TrainBatch:
    cond, null = conditions(roles, count), roles.backbone.encode([""])
    return TrainBatch(METHOD.warmup, 9, count, cond, null, None, torch.Generator().manual_seed(0))


def given(roles: Roles, count: int = 8) -> tuple[Tensor, Tensor]:
    """States, and times of all steps in no order."""
    x = torch.randn((count, *roles.backbone.shape), generator=torch.Generator().manual_seed(1))
    return x, METHOD.times(roles.backbone.schedule)[torch.tensor([2, 0, 3, 1, 1, 0, 2, 3])[:count]]


@pytest.mark.parametrize("schedule", [tiny.TABLE, Flow(), EDM()])
def test_a_time_is_in_the_segment_that_starts_at_it(schedule: object) -> None:
    times = timegrid.uniform(schedule, 4)  # type: ignore[arg-type]
    assert timegrid.segments_at(times, times[:-1]).tolist() == [0, 1, 2, 3]
    assert timegrid.segments_at(times, times[:-1].float()).tolist() == [0, 1, 2, 3]
    assert timegrid.segments_at(times, (times[:-1] + times[1:]) / 2).tolist() == [0, 1, 2, 3]
    assert timegrid.segments_at(times, torch.stack([times[0] + 1, times[-1]])).tolist() == [0, 3]
    assert timegrid.segments_at(times[[0, -1]], times).tolist() == [0] * 5


def marked(seen: list[tuple[int, int]]) -> Denoise:
    """Each step's network adds its number, and each sample's condition is in the answer."""

    def own(k: int, cond: dict[str, Tensor]) -> Denoise:
        def network(x: Tensor, t: Tensor) -> Split:
            seen.append((k, len(x)))
            return Split(x + k + cond["c"][:, None], x * k)

        return network

    return own  # type: ignore[return-value]


@pytest.mark.parametrize("order", [[0, 0, 1, 2, 2, 3], [3, 0, 2, 1, 0, 3], [2, 2], [1, 0], [3, 3, 0]])
@pytest.mark.parametrize("told", [True, False])
def test_a_batch_is_split_by_step_and_put_together_again(order: list[int], told: bool) -> None:
    step, seen, times = torch.tensor(order), list[tuple[int, int]](), timegrid.uniform(tiny.TABLE, 4)
    x, c = torch.arange(len(order) * 2.0).reshape(-1, 2), torch.arange(len(order)) / 10
    found = by_step(marked(seen), {"c": c}, times, step if told else None)(x, times[step])  # type: ignore[arg-type]
    assert torch.equal(found.x0, x + step[:, None] + c[:, None])
    assert torch.equal(found.eps, x * step[:, None])
    assert seen == [(k, order.count(k)) for k in sorted(set(order))]


@COPIES
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_equal_sets_of_weights_are_one_student_to_the_bit(lora: bool, precision: str) -> None:
    """At the start, and wherever all sets are equal; a split batch computes its rows in smaller calls."""
    several, single = apart(lora), one(lora)
    perturb(single, "student", 1)
    several.start_from(single.student_state())
    x, t = given(several)
    cond = conditions(several)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for k in range(4):
            at = METHOD.times(several.backbone.schedule)[k].expand(8)
            found, wanted = (student_of(METHOD, r, cond)(x, at) for r in (several, single))
            assert torch.equal(found.x0, wanted.x0) and torch.equal(found.eps, wanted.eps)
        whole = student_of(METHOD, several, cond)(x, t).x0
        for i in range(8):
            row = {n: v[i : i + 1] for n, v in cond.items()}
            alone = student_of(METHOD, single, row)(x[i : i + 1], t[i : i + 1]).x0
            torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=2e-2 if precision == "bf16" else 1e-5)


@COPIES
def test_each_step_has_weights_of_its_own(lora: bool) -> None:
    roles = apart(lora)
    perturb(roles, "student", 1, 0.2)
    x, _ = given(roles)
    cond, answers = conditions(roles), list[Tensor]()
    with torch.no_grad():
        for k in range(4):
            own = one(lora)
            own.start_from(roles.student_state(k))
            at = METHOD.times(roles.backbone.schedule)[k].expand(8)
            answers.append(own.denoise("student", cond)(x, at).x0)
            torch.testing.assert_close(roles.denoise("student", cond)(x, at).x0, answers[-1], rtol=0, atol=1e-6)
            told = roles.denoise("student", cond, step=torch.tensor([k]))
            torch.testing.assert_close(told(x, at).x0, answers[-1], rtol=0, atol=1e-6)
        mixed = roles.denoise("student", cond)(*given(roles)).x0
    for i, k in enumerate([2, 0, 3, 1, 1, 0, 2, 3]):
        torch.testing.assert_close(mixed[i], answers[k][i], rtol=0, atol=1e-5)


@COPIES
def test_teacher_and_fake_score_stay_as_they_are(lora: bool) -> None:
    several, single = apart(lora), one(lora)
    perturb(several, "student", 1, 0.2)
    assert [*several.trained["fake"]] == [*single.trained["fake"]]
    assert all(torch.equal(several.trained["fake"][n], p) for n, p in single.trained["fake"].items())
    x, t = given(several)
    with torch.no_grad():
        found, wanted = (r.denoise("fake", conditions(several))(x, t).x0 for r in (several, single))
    assert torch.equal(found, wanted)


@COPIES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_has_gradients_of_its_own_samples_alone(lora: bool, checkpointing: bool) -> None:
    backbone = tiny.stable_diffusion() if checkpointing else tiny.denoiser()
    roles = apart(lora, backbone, checkpointing=checkpointing)
    perturb(roles, "student", 1, 0.02)
    d = draw(METHOD, roles, conditions(roles), 8, torch.Generator().manual_seed(0), with_gradient=True)
    assert sorted(set(d.segment.tolist())) == [0, 1, 2, 3]
    for k in range(4):
        mine = d.landed[d.segment == k].square().sum()
        for other, name in enumerate(roles.step_names):
            own = list(roles.served[name].values())
            grads = torch.autograd.grad(mine, own, allow_unused=True, retain_graph=True)
            assert any(g is not None and bool(g.any()) for g in grads) == (other == k)


def gradient_of(roles: Roles) -> dict[str, Tensor]:
    *_, loss = matching_losses(METHOD, roles, batch_of(roles))
    own = roles.trained["student"]
    grads = torch.autograd.grad(loss.value, list(own.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(own.items(), grads, strict=True)}


@COPIES
def test_gradients_of_equal_sets_sum_to_those_of_one_student(lora: bool) -> None:
    several, single = apart(lora), one(lora)
    perturb(single, "student", 1)
    several.start_from(single.student_state())
    parts, whole = gradient_of(several), gradient_of(single)
    for name, wanted in whole.items():
        names = [name.replace(".student.", f".{s}.") if lora else f"{s}.{name}" for s in several.step_names]
        assert len({*names} & {*parts}) == 4
        torch.testing.assert_close(sum(parts[n] for n in names), wanted, rtol=1e-3, atol=1e-6)


def run_of(
    roles: Roles, train: TrainConfig, method: DistributionMatching = METHOD, run: Path | None = None
) -> Iterator[Step]:
    return distill(roles, method, embed(roles.backbone, tiny.WORDS, None, ""), train, run)


@COPIES
@pytest.mark.parametrize("batch", [8, 1])
def test_weights_change_from_their_own_steps_samples_only(
    lora: bool, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that no sample has drawn keeps its weights to the bit."""
    roles = apart(lora)
    perturb(roles, "student", 1, 0.02)
    roles.update_average(0.0)
    before = {n: p.detach().clone() for n, p in roles.trained["student"].items()}
    monkeypatch.setattr(timegrid, "draw_segments", lambda count, *_: torch.full((count,), 2))
    for _ in run_of(roles, TrainConfig(iterations=3, batch=batch, lr=1e-2, fake_lr=1e-2)):
        pass
    for k, name in enumerate(roles.step_names):
        own = roles.served[name]
        same = [torch.equal(before[n], p) for n, p in own.items()]
        assert all(same) if k != 2 else not all(same)
        averages = [torch.equal(before[n], roles.average[n]) for n in own]
        assert all(averages) if k != 2 else not all(averages)


@COPIES
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_killed_run_resumes_to_the_bit(lora: bool, precision: str, tmp_path: Path) -> None:
    train = TrainConfig(iterations=4, batch=4, lr=1e-2, fake_lr=1e-2, checkpoint_every=2, precision=precision)  # type: ignore[arg-type]
    whole = apart(lora)
    for _ in run_of(whole, train, run=tmp_path / "whole"):
        pass
    killed = apart(lora)
    for step in run_of(killed, train, run=tmp_path / "killed"):
        if step.iteration == 2:
            break
    again = apart(lora)
    iterations = [step.iteration for step in run_of(again, train, run=tmp_path / "killed")]
    assert iterations == [3, 4]
    assert [*whole.trained["student"]] == [*again.trained["student"]]
    for name, p in whole.trained["student"].items():
        assert torch.equal(p, again.trained["student"][name]), name
        assert torch.equal(whole.average[name], again.average[name])
    sets = [torch.cat([p.flatten() for p in whole.served[name].values()]) for name in whole.step_names]
    assert all(not torch.equal(sets[0], other) for other in sets[1:])


@COPIES
def test_averages_serve_in_previews(lora: bool) -> None:
    roles = apart(lora)
    perturb(roles, "student", 1, 0.2)
    x, t = given(roles)
    cond = conditions(roles)
    with torch.no_grad():
        live = roles.denoise("student", cond)(x, t).x0
        with roles.averaged():
            assert not torch.equal(roles.denoise("student", cond)(x, t).x0, live)
        roles.update_average(0.0)
        with roles.averaged():
            torch.testing.assert_close(roles.denoise("student", cond)(x, t).x0, live)


def test_steps_without_a_sample_yet_are_not_lost_gradients() -> None:
    """Half of the tensors of the steps that had one have to be reached."""
    roles = apart()
    first = [*roles.served["student_3"]]
    for names, lost in ((first, False), (first[:1], True), ([], True)):
        reach = Reach()
        reach.add("student", names)
        for _ in range(Reach.PATIENCE - 1):
            reach.check(roles, ["student"])
        if lost:
            with pytest.raises(ValueError, match="the student's loss reaches"):
                reach.check(roles, ["student"])
        else:
            reach.check(roles, ["student"])


def test_a_step_is_called_as_adapters_beside_another_are() -> None:
    assert [step_name("student", k) for k in range(3)] == ["student", "student_2", "student_3"]
    roles = apart()
    assert roles.step_names == ["student", "student_2", "student_3", "student_4"]
    again = one(backbone=roles.backbone)  # a later run on the same teacher removes them
    assert not any("student_2" in n for n, _ in again.backbone.module.named_parameters())


def test_other_rewards_and_data_train_as_well() -> None:
    """The surrogate of a reward samples whole trajectories."""
    method = DistributionMatching(steps=2, warmup=0, reward=RewardConfig(weight=1.0, by="preference", group=2))
    roles = roles_for(tiny.denoiser(), method, RolesConfig(rank=2, per_step=True))
    object.__setattr__(roles, "reward", lambda images, prompts: images.flatten(1).mean(1))
    found = list(run_of(roles, TrainConfig(iterations=1, batch=4), method))
    assert "surrogate_loss" in found[0].metrics


@pytest.mark.parametrize(("method", "expected"), [
    (DistributionMatching(steps=(4, 2, 1)), r"method\.steps: got \[4, 2, 1\] with roles\.per_step=true"),
    (DistributionMatching(steps=1), r"method\.steps: got 1 with"),
    (DistributionMatching(random_times=True), r"method\.random_times: got true"),
    (DistributionMatching(ladder=(16,)), r"method\.ladder: got \[16\]"),
    (DistributionMatching(analytic_first_step=True), r"method\.analytic_first_step: got true"),
    (DistributionMatching(fake=FakeScoreConfig(pull=0.03)), r"method\.fake\.pull: got 0\.03"),
    (preset("lcm"), r"method\.name: got lcm"),
    (preset("progressive"), r"method\.name: got progressive"),
    (preset("trajp-l"), r"method\.name: got trajp-l"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_a_training(method: Method, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        require_per_step(method, RolesConfig(per_step=True))
    assert "\n" not in str(error.value)
    require_per_step(method, RolesConfig())


def test_sharding_and_a_rank_of_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.shard: got true with roles\.per_step=true"):
        require_per_step(METHOD, RolesConfig(per_step=True), sharded=True)
    with pytest.raises(ValueError, match=r"per_step: got True with rank=0"):
        RolesConfig(per_step=True, rank=0)
    copies = roles_for(tiny.denoiser(), METHOD, RolesConfig(per_step=True, lora=False, rank=0))  # a rank of no LoRA
    assert len(copies.networks) == 6


def test_a_run_from_before_the_setting_resumes() -> None:
    roles = one()
    data, train = embed(roles.backbone, tiny.WORDS, None, ""), TrainConfig(iterations=2)
    now = settings_of(roles, METHOD, data, train, 1, None, None)
    before = now | {"roles": {k: v for k, v in now["roles"].items() if k != "per_step"}}
    require_unchanged(before, now, "run")
    other = settings_of(apart(), METHOD, data, train, 1, None, None)
    with pytest.raises(ValueError, match=r"roles\.per_step (f|F)alse -> (t|T)rue"):
        require_unchanged(before, other, "run")


def test_networks_without_it_are_made_as_before() -> None:
    roles = make_roles(tiny.denoiser(), RolesConfig(rank=2))
    assert roles.step_times is None and roles.step_names == ["student"]
    assert roles.served["student"] is roles.trained["student"]


def test_stages_have_as_many_steps_and_each_is_named_where_it_is() -> None:
    """Before the first stage is trained, not after it."""
    changed = ["roles.per_step=true", "method.steps=2", "warm_start.train={iterations: 20, batch: 4}"]
    first = "warm_start.method={name: tdm, steps: 4, warmup: 1}"
    with pytest.raises(ValueError, match=r"warm_start\.method\.steps: got 4 with method\.steps=2"):
        read_recipe("tdm4", [*changed, first], DistillRecipe)
    read_recipe("tdm4", [*changed, first.replace("4", "2")], DistillRecipe)
    other = "warm_start.method={name: trajp-l, steps: 2, head: none}"
    with pytest.raises(ValueError, match=r"warm_start\.method\.name: got trajp-l with roles\.per_step=true"):
        read_recipe("tdm4", [*changed, other, "warm_start.data={source: trajectories, count: 8}"], DistillRecipe)
