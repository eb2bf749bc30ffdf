"""`docs/extending.md`, followed to the letter."""

import re

import pytest
import torch

from fewstep.methods.distribution_matching import DistributionMatching, draw, student_loss
from fewstep.objectives.reverse_kl import SURROGATE_LOSSES
from fewstep.roles.roles import RolesConfig, make_roles
from tests.project import ROOT

from . import tiny


def test_an_objective_in_ten_minutes() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    try:
        for block in blocks:
            exec(block, names)
        roles = make_roles(tiny.denoiser(), RolesConfig(rank=2))
        method = DistributionMatching(loss="charbonnier", steps=2)
        d = draw(method, roles, roles.backbone.encode(["red cat"] * 4), 4, torch.Generator().manual_seed(0), with_gradient=True)
        value = student_loss(method, roles.backbone.schedule, d, d.x0 + 1, d.x0 * 0)
        assert any(g.any() for g in torch.autograd.grad(value, list(roles.trained["student"].values())))
    finally:
        SURROGATE_LOSSES.pop("charbonnier", None)
    with pytest.raises(ValueError, match=r"loss: got 'charbonnier'"):
        DistributionMatching(loss="charbonnier")
