"""Presets: each trains its own roles; settings beside a name win."""

import pytest
import torch

from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.methods.matching_settings import FakeScoreConfig, MatchConfig
from fewstep.methods.presets import PRESETS, ROLES, preset, require_roles
from fewstep.roles.roles import TRAINED, Role, RolesConfig, make_roles

from .. import tiny
from .common import gradients, updates


@pytest.mark.parametrize("name", [n for n, m in PRESETS.items() if isinstance(m, DistributionMatching)])
@pytest.mark.parametrize("share", [True, False])
def test_every_preset_trains_its_own_roles(name: str, share: bool) -> None:
    method = preset(name)
    assert isinstance(method, DistributionMatching)
    backbone = tiny.denoiser()
    roles = make_roles(backbone, RolesConfig(lora=share, rank=2), condition_values=method.condition_values)
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
    assert found == ["fake"] * method.fake.updates + ["student"]
    assert method.name == name


# What each paper says, where it is not TDM's: matched state, divergence, the weight of Fisher's second term,
# noise levels, fake updates, solver.
PAPERS = {
    "tdm": ("noisy", "reverse-kl", None, "segment", 1, "ddim"),
    "tdm-unify": ("noisy", "reverse-kl", None, "segment", 1, "ddim"),
    "tdm-fisher": (
        "noisy",
        "fisher",
        0.5,
        "segment",
        1,
        "ddim",
    ),  # half of the squared difference is the divergence itself
    "dmd2": ("clean", "reverse-kl", None, "full", 10, "renoise"),  # TDM, app. F
    "diff-instruct": ("clean", "reverse-kl", None, "full", 1, "ddim"),
    "sid": ("clean", "fisher", 1.0, "full", 1, "renoise"),  # alpha = 1 (arXiv 2404.04057, sec. 5)
}


def test_a_presets_settings_are_its_papers() -> None:
    assert {n for n, m in PRESETS.items() if isinstance(m, DistributionMatching)} == PAPERS.keys()
    for name, (state, divergence, correction, tau_range, updates_, solver) in PAPERS.items():
        m = preset(name)
        assert isinstance(m, DistributionMatching)
        found = (m.match.state, m.match.divergence, m.match.tau_range, m.fake.updates, m.solver)
        assert found == (state, divergence, tau_range, updates_, solver)
        assert correction in (None, m.match.fisher_correction)


def test_settings_beside_a_preset_win() -> None:
    assert preset("dmd2", fake={"updates": 5}, steps=2) == DistributionMatching(
        steps=2,
        solver="renoise",
        loss="l2",
        name="dmd2",
        match=MatchConfig(state="clean", tau_range="full", tau_max=0.98),
        fake=FakeScoreConfig(updates=5, share_noised_sample=False),
    )


@pytest.mark.parametrize(
    ("name", "roles", "expected"),
    [
        (
            "pas",
            RolesConfig(),
            "roles.rank: got 32, method pas stands for 0; "
            "set roles.rank=0, or method.name=trajp-l with method.head=shared to train a LoRA",
        ),
        ("pas", RolesConfig(lora=False), "roles.lora: got false, method pas stands for true"),
        (
            "sfd",
            RolesConfig(),
            "roles.lora: got true, method sfd stands for false; "
            "set roles.lora=false, or method.name=trajp-l with method.head=none to train a LoRA",
        ),
    ],
)
def test_a_name_is_not_trained_in_roles_that_make_it_another_method(
    name: str, roles: RolesConfig, expected: str
) -> None:
    with pytest.raises(ValueError, match=f"^{expected}"):
        require_roles(name, roles)


def test_all_other_names_take_any_roles() -> None:
    for name in PRESETS.keys() - ROLES.keys():
        for roles in (RolesConfig(), RolesConfig(rank=0), RolesConfig(lora=False)):
            require_roles(name, roles)
