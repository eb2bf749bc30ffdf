"""The public functions against what stands behind them."""

import warnings
from typing import Any

import pytest
import torch

import fewstep
from fewstep.data.prompts import embed
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill

from . import tiny


def test_distill_trains_as_it_is_told() -> None:
    method = fewstep.TDM(steps=2, warmup=1, guidance=2.0)
    *_, ours = fewstep.distill(
        tiny.stable_diffusion(),
        method,
        tiny.WORDS,
        train=fewstep.TrainConfig(
            iterations=3, batch=2, lr=1e-3, fake_lr=1e-2, ema=0.9, decay=2, accumulate=2, precision="bf16", seed=5
        ),
        roles=fewstep.RolesConfig(rank=2, checkpointing=True),
    )
    backbone = tiny.stable_diffusion()
    config = TrainConfig(
        iterations=3, batch=2, lr=1e-3, fake_lr=1e-2, decay=2, accumulate=2, ema=0.9, seed=5, precision="bf16"
    )
    roles = make_roles(backbone, RolesConfig(rank=2, checkpointing=True), seed=5)
    *_, expected = distill(roles, method, embed(backbone, tiny.WORDS, None, "tiny"), config)
    assert ours.metrics == expected.metrics
    for a, b in zip(ours.roles.average.values(), roles.average.values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"^quantize: got int8"):  # arrives: the network is too narrow for it
        next(
            fewstep.distill(
                backbone,
                method,
                tiny.WORDS,
                train=fewstep.TrainConfig(iterations=2),
                roles=fewstep.RolesConfig(quantize="int8"),
            )
        )
    with pytest.raises(ValueError, match=r"^rank: got 32, method pas stands for 0; set rank=0"):
        next(
            fewstep.distill(
                backbone,
                fewstep.TrajectoryImitation(head="shared", name="pas"),
                tiny.WORDS,
                train=fewstep.TrainConfig(iterations=1),
                roles=fewstep.RolesConfig(rank=32),
            )
        )


def first(teacher: fewstep.Denoiser, **settings: Any) -> fewstep.Step:
    steps = fewstep.distill(
        teacher,
        fewstep.TDM(steps=2, warmup=0),
        tiny.WORDS,
        train=fewstep.TrainConfig(iterations=1, batch=2),
        watch=None,
        **settings,
    )
    step = next(steps)
    steps.close()
    return step


def test_rates_and_rank_that_are_not_given_are_those_of_what_is_trained() -> None:
    """LoRA takes ten times the rates of all weights, and a rank that a small network can carry."""
    assert first(tiny.denoiser()).roles.config.rank == 4
    assert TrainConfig(iterations=1).rates(True) == (1e-4, 1e-3)
    assert TrainConfig(iterations=1).rates(False) == (1e-5, 1e-4)
    assert TrainConfig(iterations=1, lr=3e-4, fake_lr=2e-4).rates(True) == (3e-4, 2e-4)


@pytest.mark.parametrize("lora", [True, False])
def test_the_first_update_has_the_rate_of_what_is_trained(lora: bool) -> None:
    """Adam's first update moves every weight that has a gradient by the rate."""
    step = first(tiny.denoiser(), roles=RolesConfig(rank=2, lora=lora))
    before = make_roles(tiny.denoiser(), RolesConfig(rank=2, lora=lora), seed=0).trained["fake"]
    moved = max(float((p.detach() - before[n]).abs().max()) for n, p in step.roles.trained["fake"].items())
    assert moved == pytest.approx(1e-3 if lora else 1e-4, rel=0.02)


def test_a_rank_that_is_too_large_for_its_network_is_told() -> None:
    with pytest.warns(
        fewstep.DistillationWarning,
        match=r"^LORA rank: 32 trains \d+% as many weights as this small network has.*set rank=4, or",
    ):
        assert first(tiny.denoiser(), roles=RolesConfig(rank=32)).roles.config.rank == 32
    with warnings.catch_warnings():
        warnings.simplefilter("error", fewstep.DistillationWarning)
        first(tiny.denoiser(), roles=RolesConfig(rank=4))
