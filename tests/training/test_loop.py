"""The training loop: what it changes and what not, bit-exact resuming, and every way to stop."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.backbones.base import Denoiser
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import VP, Flow
from fewstep.data.prompts import embed
from fewstep.methods.consistency import ConsistencyDistillation
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.methods.matching_settings import FakeScoreConfig
from fewstep.methods.method import Loss, TrainBatch
from fewstep.methods.progressive import ProgressiveDistillation
from fewstep.roles import adapters
from fewstep.roles.roles import TRAINED, Roles, RolesConfig, make_roles
from fewstep.training import loop, state
from fewstep.training.loop import Step, TrainConfig, distill
from fewstep.training.optimizer import OptimizerName, make_optimizer
from fewstep.training.settings import require_unchanged, settings_of
from fewstep.training.state import checkpoints

from .. import tiny
from .common import CONFIG, METHOD, digest, metrics, parts, run, tensors, wait_for

# What changes and what does not


@pytest.mark.parametrize(
    "backbone", [tiny.denoiser, tiny.flow_denoiser, tiny.stable_diffusion], ids=["table", "flow", "sd"]
)
def test_training_leaves_the_base_as_it_was(backbone: type) -> None:
    made = backbone()
    before = digest(made.module)
    roles, data = parts(backbone=made)
    assert len(list(distill(roles, replace(METHOD, warmup=0), data, replace(CONFIG, iterations=3)))) == 3
    assert digest(made.module) == before
    assert all(
        bool(p.any())
        for n, p in roles.trained["student"].items()
        if "lora_B" in n and "to_k" not in n and "to_q" not in n
    )


@pytest.mark.parametrize("share", [True, False])
def test_the_warm_up_trains_the_fake_score_alone_and_then_both_move(share: bool) -> None:
    roles, data = parts(share)
    at = {r: {n: p.detach().clone() for n, p in roles.trained[r].items()} for r in TRAINED}
    base = digest(roles.networks["teacher"])
    for step in distill(roles, METHOD, data, CONFIG):
        moved = {r: any(not torch.equal(p, at[r][n]) for n, p in roles.trained[r].items()) for r in TRAINED}
        averaged = any(not torch.equal(v, at["student"][n]) for n, v in roles.average.items())
        training = step.iteration > METHOD.warmup
        assert moved == {"fake": True, "student": training}
        assert averaged == training
        assert ("student_loss" in step.metrics) == training
        assert {"fake_loss", "fake_grad"} <= set(step.metrics)
    assert digest(roles.networks["teacher"]) == base


def test_the_students_rate_falls_to_zero_in_a_line(tmp_path: Path) -> None:
    config = replace(CONFIG, decay=4)
    assert [config.lr_at("student", i) for i in range(6)] == pytest.approx(
        [1e-3, 1e-3, 1e-3, 1e-3 * 0.75, 1e-3 * 0.5, 1e-3 * 0.25]
    )
    assert {config.lr_at("fake", i) for i in range(6)} == {config.fake_lr}
    (roles, data), (others, _) = parts(), parts()
    list(distill(roles, METHOD, data, config, tmp_path))
    list(distill(others, METHOD, data, replace(CONFIG, iterations=3)))
    plain, _ = parts()
    list(distill(plain, METHOD, data, CONFIG))
    start, end, far = (
        torch.cat([p.detach().flatten() for p in r.trained["student"].values()]) for r in (others, roles, plain)
    )
    assert (
        0 < (end - start).norm() < 0.75 * (far - start).norm()
    )  # the same first three iterations, then smaller and smaller steps
    with pytest.raises(
        ValueError, match=r"other settings: train\.iterations 6 -> 9; set"
    ):  # a longer run has had other rates
        next(distill(parts()[0], METHOD, data, replace(config, iterations=9), tmp_path))


def test_the_rates_rise_from_zero_over_each_roles_first_updates() -> None:
    config = replace(CONFIG, lr_warmup=4, iterations=8)
    assert [config.lr_at("fake", i) for i in range(6)] == pytest.approx([1e-2 * r for r in (0.25, 0.5, 0.75, 1, 1, 1)])
    assert [config.lr_at("student", i, 2) for i in range(2, 8)] == pytest.approx(
        [1e-3 * r for r in (0.25, 0.5, 0.75, 1, 1, 1)]
    )
    (roles, data), (plain, _) = parts(), parts()
    start = {n: p.detach().clone() for n, p in roles.trained["student"].items()}
    method = replace(METHOD, warmup=0)
    next(distill(roles, method, data, config))
    next(distill(plain, method, data, replace(config, lr_warmup=0)))
    for n, p in roles.trained["student"].items():  # Adam's first update is the rate times the gradient's signs
        torch.testing.assert_close(p - start[n], (plain.trained["student"][n] - start[n]) / 4)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr_warmup", -1),
        ("lr_warmup", 99),
        ("betas", (0.0, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("weight_decay", float("nan")),
    ]
    + [(option, value) for option in ("lr", "fake_lr", "clip") for value in (0.0, float("nan"), float("inf"))],
)
def test_settings_that_cannot_be_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{option}: got .*, allowed are "):
        replace(CONFIG, **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [True, False])
def test_one_update_moves_one_role(share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from between the two updates of an iteration."""
    roles, data = parts(share)
    kept = {r: {n: p.detach().clone() for n, p in roles.trained[r].items()} for r in TRAINED}
    seen = []
    update = loop._update

    def watched(*args: object) -> Tensor:
        before = {r: {n: p.detach().clone() for n, p in roles.trained[r].items()} for r in TRAINED}
        norm = update(*args)  # type: ignore[arg-type]
        seen.append([r for r in TRAINED if any(not torch.equal(p, before[r][n]) for n, p in roles.trained[r].items())])
        return norm

    monkeypatch.setattr(loop, "_update", watched)
    list(
        distill(roles, replace(METHOD, warmup=0, fake=FakeScoreConfig(updates=2)), data, replace(CONFIG, iterations=2))
    )
    assert seen == [["fake"], ["fake"], ["student"]] * 2
    assert kept.keys() == {"student", "fake"}


@pytest.mark.parametrize("ema", [0.98, 0.5, 0.0])
def test_average_is_its_formula_from_the_first_student_update(ema: float) -> None:
    roles, data = parts()
    expected = {n: v.clone() for n, v in roles.average.items()}
    for step in distill(roles, METHOD, data, replace(CONFIG, ema=ema)):
        if step.iteration > METHOD.warmup:
            done = step.iteration - METHOD.warmup
            keep = min(ema, done / (done + 9))
            expected = {n: keep * expected[n] + (1 - keep) * p.detach() for n, p in roles.trained["student"].items()}
    for n, value in roles.average.items():
        torch.testing.assert_close(value, expected[n], rtol=1e-6, atol=1e-8)
    if ema == 0:
        assert all(torch.equal(v, roles.trained["student"][n]) for n, v in roles.average.items())


@dataclass(frozen=True)
class Place:
    """One process of several, as `accelerate.Accelerator` says where it is; nothing is shared with the others."""

    process_index: int
    num_processes: int = 1
    is_main_process: bool = True


def draws_of(rank: int, accumulate: int, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, list[float]]]]:
    """For every iteration and batch of a process: the seed of its noise, and which conditions it took."""
    seen: list[list[tuple[int, list[float]]]] = []
    inner = DistributionMatching.losses

    def watched(method: DistributionMatching, roles: Roles, batch: TrainBatch) -> Iterator[Loss]:
        if len(seen) <= batch.iteration:
            seen.append([])
        seen[batch.iteration].append((batch.rng.initial_seed(), batch.cond["label"].flatten().tolist()))
        return inner(method, roles, batch)

    monkeypatch.setattr(loop, "Accelerator", lambda: Place(rank))
    monkeypatch.setattr(DistributionMatching, "losses", watched)
    backbone = tiny.denoiser()
    words = [letter * n for letter in "abe" for n in range(1, 30)]
    roles, data = make_roles(backbone, RolesConfig(rank=2)), embed(backbone, words, None, "tiny")
    list(distill(roles, METHOD, data, replace(CONFIG, accumulate=accumulate)))
    monkeypatch.undo()
    return seen


def test_every_iteration_batch_and_process_draws_its_own_noise_and_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [draws_of(rank, 2, monkeypatch) for rank in range(2)]
    batches = [batch for rank in ranks for iteration in rank for batch in iteration]
    assert len(batches) == 2 * CONFIG.iterations * 2
    for of in (0, 1):  # noise, prompts
        assert len({str(batch[of]) for batch in batches}) == len(batches)
    # Two processes of two batches each draw what one process of four does.
    together = [[*one, *two] for one, two in zip(*ranks, strict=True)]
    assert draws_of(0, 4, monkeypatch) == together


def test_a_global_batch_is_the_same_batches_in_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of processes, all of them together draw what one draws, and record the same settings."""
    shared = replace(CONFIG, global_batch=4 * CONFIG.batch)
    alone = draws_of(0, 4, monkeypatch)
    for count in (1, 2, 4):
        own = shared.on(count)
        assert (own.accumulate, own.global_batch) == (4 // count, None) and own.on(7) == own
        ranks = [draws_of(rank, own.accumulate, monkeypatch) for rank in range(count)]
        assert [[b for part in parts for b in part] for parts in zip(*ranks, strict=True)] == alone
    roles, data = parts()
    one, two = (
        settings_of(roles, METHOD, data, config, 4, None, None)
        for config in (shared.on(2), replace(CONFIG, accumulate=4))
    )
    assert one == two == settings_of(roles, METHOD, data, shared, 4, None, None)


@pytest.mark.parametrize(
    ("batch", "processes", "next_"),
    [
        (16, 8, "the number of processes, 8; set train.batch=8"),
        (5, 1, "set train.batch=4"),
        (1, 48, "start a number of processes that divides it"),
        (1, 128, "start a number of processes that divides it"),
    ],
)
def test_a_global_batch_that_cannot_be_shared_is_refused(batch: int, processes: int, next_: str) -> None:
    with pytest.raises(ValueError, match=f"^train.global_batch: got 64, .*{next_}$"):
        TrainConfig(iterations=1, batch=batch, global_batch=64).on(processes)
    with pytest.raises(ValueError, match=r"^accumulate: got 2 with global_batch=64, .* set one of them"):
        TrainConfig(iterations=1, batch=batch, global_batch=64, accumulate=2)


def test_both_roles_have_the_settings_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.optim.Optimizer] = []

    def watched(
        parameters: Sequence[nn.Parameter], name: OptimizerName, lr: float, betas: tuple[float, float], decay: float
    ) -> torch.optim.Optimizer:
        made.append(make_optimizer(parameters, name, lr, betas, decay))
        return made[-1]

    monkeypatch.setattr(loop, "make_optimizer", watched)
    config = replace(CONFIG, betas=(0.1, 0.95), weight_decay=0.03)
    roles, data = parts()
    list(distill(roles, METHOD, data, config))
    for optimizer, lr in zip(made, (config.lr, config.fake_lr), strict=True):
        (group,) = optimizer.param_groups
        assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.1, 0.95), 0.03, lr)
    assert TrainConfig(iterations=1, batch=1, lr=1.0, fake_lr=1.0).betas == (0.0, 0.999)  # TDM, app. D


def test_a_step_shows_its_networks_and_its_time() -> None:
    roles, steps = run(config=replace(CONFIG, iterations=METHOD.warmup + 1))
    assert steps[0].roles is roles
    assert steps[0].method is METHOD
    assert steps[0].seconds > 0
    assert all(isinstance(v, float) for v in steps[0].metrics.values())


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    (_, one), (_, again), (_, other) = (run(config=replace(CONFIG, seed=s)) for s in (0, 0, 1))
    assert metrics(one) == metrics(again)
    assert metrics(one) != metrics(other)


# Stop and go on


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("stop", [3, 4])
def test_resumed_is_straight_bit_for_bit(tmp_path: Path, share: bool, stop: int) -> None:
    """Student, fake score, average, both optimisers and all metrics, wherever the caller breaks off."""
    straight_roles, straight = run(share, out=tmp_path / "straight")
    _, first = run(share, out=tmp_path / "stopped", stop=stop)
    resumed_roles, second = run(share, out=tmp_path / "stopped")
    assert metrics(straight) == metrics(first) + metrics(second)
    assert [s.iteration for s in second] == list(range(stop + 1, 7))
    for role in TRAINED:
        for n, p in straight_roles.trained[role].items():
            assert torch.equal(p, resumed_roles.trained[role][n])
    assert all(torch.equal(v, resumed_roles.average[n]) for n, v in straight_roles.average.items())
    one, two = (tensors(tmp_path / d / "checkpoint-000006") for d in ("straight", "stopped"))
    assert {k.partition("/")[0] for k in one} == {"student", "fake", "average", "optimizer_student", "optimizer_fake"}
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_killed_process_goes_on_from_its_last_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    """No farewell: the generator is never closed, as when the process dies, and iteration 4 is done again."""
    _, straight = run()
    roles, data = parts()
    killed = distill(roles, METHOD, data, CONFIG, tmp_path)
    for _ in range(4):
        next(killed)
    wait_for(tmp_path / "checkpoint-000003")
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000003"]
    _, second = run(out=tmp_path)
    assert metrics(second) == metrics(straight)[3:]
    killed.close()


def test_stopping_saves_where_it_stops(tmp_path: Path) -> None:
    run(out=tmp_path, stop=5)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000003", "checkpoint-000005"]


def test_a_finished_run_yields_its_last_step_and_can_be_made_longer(tmp_path: Path) -> None:
    roles, first = run(out=tmp_path)
    again_roles, (again,) = run(out=tmp_path)
    assert (again.iteration, again.metrics, again.seconds) == (6, first[-1].metrics, 0.0)
    assert all(torch.equal(v, again_roles.average[n]) for n, v in roles.average.items())
    longer = run(out=tmp_path, config=replace(CONFIG, iterations=8))[1]
    assert [s.iteration for s in longer] == [7, 8]
    assert metrics(longer) == metrics(run(config=replace(CONFIG, iterations=8))[1])[6:]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"method": replace(METHOD, loss="l2")}, "method.loss huber -> l2"),
        (
            {"method": replace(METHOD, steps=4, guidance=Guidance(scale=3.0))},
            "method.steps 2 -> 4, method.guidance.scale 2 -> 3",
        ),
        (
            {"method": replace(METHOD, guidance=Guidance(scale=2.0, rescale=0.5))},
            "method.guidance.rescale 0 -> 0.5",
        ),
        ({"config": replace(CONFIG, lr=2e-3)}, "train.lr 0.001 -> 0.002"),
        ({"config": replace(CONFIG, batch=8)}, f"train.batch {CONFIG.batch} -> 8"),
        ({"config": replace(CONFIG, seed=1)}, "train.seed 0 -> 1"),
        ({"share": False}, "roles.lora True -> False"),
    ],
)
def test_other_settings_do_not_go_on_and_are_named(tmp_path: Path, other: dict, named: str) -> None:
    run(out=tmp_path, stop=3)
    said = f"^run {re.escape(str(tmp_path))}: was made with other settings: {re.escape(named)}; set them back"
    with pytest.raises(ValueError, match=said):
        run(out=tmp_path, **other)
    assert run(out=tmp_path)[1][0].iteration == 4  # nothing is lost


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (lambda b: replace(b, schedule=VP(tiny.TABLE.alpha_bar[:980])), "teacher.schedule.levels 1000 -> 980"),
        (
            lambda b: replace(b, schedule=VP(tiny.TABLE.alpha_bar * 0.99)),
            r"teacher.schedule.alpha_bar \(33 numbers from 0.99915 to 0.0046",
        ),
        (lambda b: replace(b, schedule=Flow()), "teacher.schedule VP -> Flow"),
        (lambda b: replace(b, prediction="eps"), "teacher.prediction v -> eps"),
        (
            lambda b: replace(b, conditions=lambda prompts: {"label": torch.ones(len(prompts), 3)}),
            "conditions.label.says",
        ),
    ],
)
def test_another_process_does_not_go_on(tmp_path: Path, changed: Callable[[Denoiser], Denoiser], named: str) -> None:
    """What the network's weights do not say: its schedule, what it predicts, how prompts become conditions."""
    run(out=tmp_path, stop=3)
    backbone = changed(tiny.denoiser())
    with pytest.raises(ValueError, match=rf"made with other settings: {named}"):
        next(
            distill(
                make_roles(backbone, RolesConfig(rank=2)),
                METHOD,
                embed(backbone, tiny.WORDS, None, "tiny"),
                CONFIG,
                tmp_path,
            )
        )


def test_settings_survive_a_rounding_and_another_name(tmp_path: Path) -> None:
    run(out=tmp_path, stop=3)
    backbone = replace(tiny.denoiser(), name="other", schedule=VP(tiny.TABLE.alpha_bar.float()))
    step = next(
        distill(
            make_roles(backbone, RolesConfig(rank=2)),
            METHOD,
            embed(backbone, tiny.WORDS, None, "tiny"),
            CONFIG,
            tmp_path,
        )
    )
    assert step.iteration == 4


def test_stages_of_a_length_are_not_made_longer() -> None:
    """Progressive distillation divides its length into stages, so another length is another run."""
    assert ProgressiveDistillation(loss="l2", solver="ddim").needs.length
    assert not ConsistencyDistillation().needs.length and not METHOD.needs.length


def test_a_checkpoint_without_settings_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^run x: its checkpoint says nothing of its settings"):
        require_unchanged(None, {}, "x")


def test_other_prompts_rank_or_base_do_not_go_on(tmp_path: Path) -> None:
    run(out=tmp_path, stop=3)
    backbone = tiny.denoiser()
    roles = make_roles(backbone, RolesConfig(rank=2))
    named = {
        "prompts.count 3 -> 1": embed(backbone, ["other"], None, "tiny"),
        "teacher.weights": embed(backbone, tiny.WORDS, None, "other base"),
    }
    for said, data in named.items():
        with pytest.raises(ValueError, match=f"made with other settings: {said}"):
            next(distill(roles, METHOD, data, CONFIG, tmp_path))
    roles = make_roles(backbone, RolesConfig(rank=3))
    with pytest.raises(ValueError, match=r"made with other settings: roles\.rank 2 -> 3; set"):
        next(distill(roles, METHOD, embed(backbone, tiny.WORDS, None, "tiny"), CONFIG, tmp_path))


def test_a_truncated_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    run(out=tmp_path)
    file = tmp_path / "checkpoint-000006" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(
        ValueError,
        match=r"checkpoint-000006 is damaged or incomplete .*; delete that folder to go on from checkpoint-000003$",
    ):
        run(out=tmp_path)
    for part in file.parent.iterdir():
        part.unlink()
    file.parent.rmdir()
    assert [s.iteration for s in run(out=tmp_path)[1]] == [4, 5, 6]


def test_a_full_disk_stops_with_the_older_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(out=tmp_path, stop=3)

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "stream_tensors", full)
    with pytest.raises(
        OSError, match=r"cannot write checkpoint .*checkpoint-000006: .*No space left on device.*; free some space"
    ):
        run(out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000003"]
    monkeypatch.undo()
    assert [s.iteration for s in run(out=tmp_path)[1]] == [4, 5, 6]


# What goes wrong


class Breaking(nn.Module):
    """A network whose output is not a number from its n-th call on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls, self.last = inner, 0, 10**9

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x, t, label) * (float("nan") if self.calls > self.last else 1.0)


@pytest.mark.parametrize(("role", "option"), [("fake", "train.lr or train.fake_lr"), ("student", "train.lr")])
def test_a_loss_that_is_no_number_names_role_and_iteration(tmp_path: Path, role: str, option: str) -> None:
    backbone = tiny.denoiser()
    roles, data = parts(False, replace(backbone, module=Breaking(backbone.module), time_layer="inner.time"))
    steps = distill(roles, METHOD, data, CONFIG, tmp_path)
    for _ in range(4):
        next(steps)
    broken = roles.networks["teacher" if role == "student" else "fake"]
    assert isinstance(broken, Breaking)
    broken.last = 0
    kept = rf"\(checkpoint-000003 of {re.escape(str(tmp_path))} is intact\)"
    message = rf"^the {role} loss is nan at iteration 5; lower {option}, and choose another --out {kept}$"
    with pytest.raises(FloatingPointError, match=message):
        next(steps)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000003"]
    assert all(bool(torch.isfinite(p).all()) for r in TRAINED for p in roles.trained[r].values())


def test_a_gradient_that_is_no_number_updates_nothing() -> None:
    """A finite loss with an infinite slope: weights that were good stay good."""
    roles, data = parts()
    name, weight = next(iter(roles.trained["fake"].items()))
    weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(FloatingPointError, match=r"^the fake gradient is (nan|inf) at iteration 1;"):
        list(distill(roles, METHOD, data, CONFIG))
    assert all(bool(torch.isfinite(p).all()) for p in roles.trained["fake"].values()), name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"iterations": 0}, "iterations: got 0, allowed are whole numbers from 1"),
        ({"batch": 0}, "batch: got 0, allowed are whole numbers from 1"),
        ({"batch": 2**31}, "batch: got 2147483648, allowed are whole numbers from 1 to 65536"),
        ({"checkpoint_every": 0}, "checkpoint_every: got 0, allowed are whole numbers from 1"),
        ({"lr": 0.0}, "lr: got 0.0, allowed are numbers above 0"),
        ({"lr": float("nan")}, "lr: got nan, allowed are numbers above 0"),
        ({"fake_lr": -1.0}, "fake_lr: got -1.0, allowed are numbers above 0"),
        ({"clip": 0.0}, "clip: got 0.0, allowed are numbers above 0"),
        ({"ema": 1.0}, "ema: got 1.0, allowed are numbers from 0 up to, not including, 1"),
        ({"precision": "half"}, "precision: got 'half', allowed are no, bf16"),
    ],
)
def test_settings_that_cannot_be(settings: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        replace(CONFIG, **settings)
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("share", [True, False])
def test_a_batch_smaller_than_the_steps_trains(share: bool) -> None:
    _, steps = run(share, method=replace(METHOD, steps=4), config=replace(CONFIG, batch=1))
    assert len(steps) == 6


def test_mixed_precision_trains_in_it() -> None:
    """bfloat16 inside, float32 weights and losses: near the float32 run, and not the same."""
    (_, full), (roles, half) = (
        run(config=replace(CONFIG, iterations=3)),
        run(config=replace(CONFIG, iterations=3, precision="bf16")),
    )
    assert half[0].metrics["fake_loss"] != full[0].metrics["fake_loss"]
    assert half[0].metrics["fake_loss"] == pytest.approx(full[0].metrics["fake_loss"], rel=0.05)
    assert all(p.dtype == torch.float32 for r in TRAINED for p in roles.trained[r].values())


def test_a_trained_student_is_the_same_on_its_way_out_and_back() -> None:
    """PEFT's file format carries the averaged student whole."""
    roles, _ = run()
    with roles.averaged():
        kept = roles.student_state()
    other, _ = parts()
    adapters.load_adapter(other.networks["student"], "student", kept)
    assert all(torch.equal(p, roles.average[n]) for n, p in other.trained["student"].items())


def test_steps_are_made_one_at_a_time() -> None:
    roles, data = parts()
    steps: Iterator[Step] = distill(roles, METHOD, data, CONFIG)
    before = {n: p.detach().clone() for n, p in roles.trained["fake"].items()}
    assert all(torch.equal(p, before[n]) for n, p in roles.trained["fake"].items())
    assert next(steps).iteration == 1
    assert any(not torch.equal(p, before[n]) for n, p in roles.trained["fake"].items())
