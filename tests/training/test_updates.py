"""One update of the training loop: which gradient it takes, and what AdamW makes of it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fewstep.methods.matching_settings import FakeScoreConfig
from fewstep.roles.roles import TRAINED
from fewstep.training import loop
from fewstep.training.loop import TrainConfig, distill
from fewstep.training.state import seeded

from .. import tiny
from .common import CONFIG, METHOD, parts, run, tensors, wait_for

Gradients = dict[int, Tensor]


@pytest.fixture
def gradients() -> Iterator[Gradients]:
    """The gradients of the last update of every parameter, by its id: the loop lets them go."""
    kept: Gradients = {}

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        kept.update(
            {id(p): p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        )

    handle = register_optimizer_step_pre_hook(keep)
    yield kept
    handle.remove()


@pytest.mark.parametrize("share", [True, False])
def test_accumulated_batches_give_the_mean_of_their_gradients(
    share: bool, monkeypatch: pytest.MonkeyPatch, gradients: Gradients
) -> None:
    """Two batches an iteration against each batch alone, with a step too small to matter in between."""
    still = replace(CONFIG, iterations=1, lr=1e-12, fake_lr=1e-12)
    method = replace(METHOD, warmup=0)

    def mean(config: TrainConfig, stream: int) -> dict[str, Tensor]:
        monkeypatch.setattr(
            loop,
            "seeded",
            lambda seed, step, name, rank=0, device="cpu": seeded(seed, step, name, rank + stream, device),
        )
        roles, data = parts(share)
        list(distill(roles, method, data, config))
        return {f"{r}/{n}": gradients[id(p)] for r in TRAINED for n, p in roles.trained[r].items()}

    one, two = mean(replace(still, clip=1e9), 0), mean(replace(still, clip=1e9), 1)
    both = mean(replace(still, accumulate=2, clip=1e9), 0)
    assert any(not torch.allclose(one[n], two[n], rtol=1e-2) for n in one)
    for n, g in both.items():
        torch.testing.assert_close(g, (one[n] + two[n]) / 2, rtol=1e-3, atol=1e-6)


def test_gradients_lie_in_memory_as_their_parameters_do() -> None:
    """A gradient has the strides of its parameter.

    The gradients of wide convolutions come channels last, which torch's fused AdamW reads in the wrong order without
    a word.
    """
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen.extend(
            (p.stride(), p.grad.stride())
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        )

    backbone = replace(tiny.denoiser(), module=tiny.Net(512))
    roles, data = parts(backbone=backbone)
    handle = register_optimizer_step_pre_hook(look)
    list(distill(roles, replace(METHOD, warmup=0), data, replace(CONFIG, iterations=1)))
    handle.remove()
    assert seen and all(own == gradient for own, gradient in seen)


def test_updates_are_adamw_with_the_papers_betas(tmp_path: Path, gradients: Gradients) -> None:
    """Updates are AdamW with betas (0, 0.999).

    The first moment is the last gradient, and the first step moves every weight by lr against the gradient's sign.
    """
    roles, data = parts()
    start, lr = {n: p.detach().clone() for n, p in roles.trained["fake"].items()}, CONFIG.fake_lr
    assert lr is not None
    for step in distill(roles, METHOD, data, replace(CONFIG, checkpoint_every=1), tmp_path):
        wait_for(tmp_path / f"checkpoint-{step.iteration:06d}")
        saved = tensors(tmp_path / f"checkpoint-{step.iteration:06d}")
        for n, p in roles.trained["fake"].items():
            assert p.grad is None  # let go
            grad = gradients[id(p)]
            assert torch.equal(saved[f"optimizer_fake/{n}.exp_avg"], grad)
            if step.iteration == 1:
                torch.testing.assert_close(saved[f"optimizer_fake/{n}.exp_avg_sq"], 0.001 * grad**2)
                if "lora_B" in n:
                    moved, felt = start[n] - p.detach(), grad.abs() > 1e-5  # far above Adam's epsilon
                    torch.testing.assert_close(moved[felt], lr * grad.sign()[felt], rtol=1e-2, atol=0)


def test_gradients_are_clipped_and_logged_before_it(gradients: Gradients) -> None:
    roles, steps = run(config=replace(CONFIG, clip=1e-6, iterations=3))
    for role in TRAINED:
        norm = torch.stack([gradients[id(p)].norm() for p in roles.trained[role].values()]).norm().item()
        assert 0 < norm <= 1.01e-6
        assert steps[-1].metrics[f"{role}_grad"] > 1e-6


def test_under_bf16_a_later_call_of_an_iteration_sees_what_an_earlier_update_made_of_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """autocast keeps what it cast, updated since or not, unless told otherwise."""
    config, method = (
        replace(CONFIG, precision="bf16", iterations=2),
        replace(METHOD, warmup=0, fake=FakeScoreConfig(updates=3, share_noised_sample=False)),
    )

    def metrics() -> list[dict[str, float]]:
        roles, data = parts(True)
        return [dict(s.metrics) for s in distill(roles, method, data, config)]

    found, autocast = metrics(), torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda *args, **options: autocast(*args, **(options | {"cache_enabled": False}))
    )
    assert found == metrics()
