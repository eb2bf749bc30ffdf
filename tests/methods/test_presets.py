"""Presets: each trains its own roles; settings beside a name win."""

import pytest
import torch

from fewstep.methods.matching import (
    Matching,
)
from fewstep.methods.presets import PRESETS, preset
from fewstep.roles.roles import TRAINED, Role, RolesConfig, make_roles

from .. import tiny
from .common import gradients, updates


@pytest.mark.parametrize("name", [n for n, m in PRESETS.items() if isinstance(m, Matching)])
@pytest.mark.parametrize("share", [True, False])
def test_every_preset_trains_its_own_roles(name: str, share: bool) -> None:
    method = preset(name)
    assert isinstance(method, Matching)
    backbone = tiny.denoiser()
    roles = make_roles(backbone, RolesConfig(share=share, rank=2), counts=method.conditioned)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role in TRAINED:
            for p in roles.trained[role].values():
                p.add_(0.1 * torch.randn(p.shape, generator=rng))
    found = []
    for loss in updates(roles, method):
        other: Role = "student" if loss.role == "fake" else "fake"
        assert any(g is not None and bool(g.any()) for g in gradients(loss.value, roles, loss.role))
        if loss.role == "fake":
            assert not any(g is not None and bool(g.any()) for g in gradients(loss.value, roles, other))
        with torch.no_grad():  # the caller steps at once
            for p, g in zip(roles.trained[loss.role].values(), gradients(loss.value, roles, loss.role), strict=True):
                if g is not None:
                    p.sub_(0.01 * g)
        found.append(loss.role)
    assert found == ["fake"] * method.fake_updates + ["student"]
    assert method.name == name


def test_settings_beside_a_preset_win() -> None:
    assert preset("dmd2", fake_updates=5, steps=2) == Matching(
        steps=2, match="clean", solver="renoise", tau="whole", tau_max=0.98, fake_updates=5, loss="l2", share_draw=False, name="dmd2"
    )
