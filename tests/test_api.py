"""The public functions against what stands behind them."""

import pytest
import torch

import fewstep
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill
from fewstep.training.prompts import embed

from . import tiny


def test_distill_trains_as_it_is_told() -> None:
    method = fewstep.TDM(steps=2, guidance=2.0, warmup=1)
    *_, ours = fewstep.distill(
        tiny.stable_diffusion(), method, tiny.WORDS, iterations=3, batch=2, lr=1e-3, fake_lr=1e-2, ema=0.9, decay=2, accumulate=2, precision="bf16",
        rank=2, checkpointing=True, seed=5,
    )  # fmt: skip
    backbone = tiny.stable_diffusion()
    config = TrainConfig(3, batch=2, lr=1e-3, fake_lr=1e-2, decay=2, accumulate=2, ema=0.9, seed=5, precision="bf16")
    roles = make_roles(backbone, RolesConfig(rank=2, checkpointing=True), seed=5)
    *_, expected = distill(roles, method, embed(backbone, tiny.WORDS, None, "tiny"), config)
    assert ours.metrics == expected.metrics
    for a, b in zip(ours.roles.average.values(), roles.average.values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"^base: got int8"):  # arrives: the network is too narrow for it
        next(fewstep.distill(backbone, method, tiny.WORDS, iterations=1, base="int8"))
    with pytest.raises(ValueError, match=r"^rank: got 32, method pas stands for 0; set rank=0"):
        next(fewstep.distill(backbone, fewstep.PathImitation(head="shared", name="pas"), tiny.WORDS, iterations=1))
