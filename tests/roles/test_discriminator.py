"""Features of the frozen teacher, and heads that are told the noise level and the step count."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep.backbones.base import Backbone, Denoiser
from fewstep.roles.discriminator import features, make_discriminator
from fewstep.roles.roles import RolesConfig, make_roles

from .. import tiny
from .common import given


def own() -> Denoiser:
    return replace(tiny.denoiser(), feature_layers=("inp", "to_q"))


BACKBONES: dict[str, Callable[[], Backbone]] = {"own": own, "sd": tiny.stable_diffusion}


@pytest.mark.parametrize("name", BACKBONES)
def test_features_are_the_layers_outputs_and_the_rest_does_not_run(name: str) -> None:
    backbone = BACKBONES[name]()
    x, t, cond, _ = given(backbone)
    outputs: dict[str, Tensor] = {}

    def record(n: str, output: Tensor) -> None:
        outputs[n] = output

    for n, module in backbone.module.named_modules():
        module.register_forward_hook(lambda _, __, output, n=n: record(n, output))
    with torch.no_grad():
        found = features(backbone, backbone.module, x, t, cond)
    assert not [n for n in outputs if n.startswith("up_blocks") or n in ("", "out")]
    for tokens, n in zip(found, backbone.feature_layers, strict=True):
        torch.testing.assert_close(tokens, outputs[n].flatten(2).mT)
        assert tokens.shape[0] == 2


def test_gradients_reach_the_image_and_never_the_teacher() -> None:
    backbone = tiny.stable_diffusion()
    x, t, cond, _ = given(backbone)
    judge = make_discriminator(backbone, backbone.module, (4, 2), seed=0)
    x.requires_grad_()
    logits = judge.logits(features(backbone, backbone.module, x, t, cond), t, 4)
    assert logits.shape[0] == 2
    logits.sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    assert all(p.grad is not None for p in judge.heads.parameters())
    assert all(p.grad is None for p in backbone.module.parameters())


def test_heads_are_told_noise_level_and_step_count() -> None:
    backbone = own()
    judge = make_discriminator(backbone, backbone.module, (4, 2), seed=0)
    x, t, cond, _ = given(backbone)
    with torch.no_grad():
        tokens = features(backbone, backbone.module, x, t, cond)
        first = judge.logits(tokens, t, 4)
        assert not torch.equal(first, judge.logits(tokens, t, 2))
        assert not torch.equal(first, judge.logits(tokens, t - 200, 4))
        assert torch.equal(first, judge.logits(tokens, t, 4))


def test_it_reads_the_teacher_whatever_the_other_roles_have_become() -> None:
    roles = make_roles(tiny.stable_diffusion(), RolesConfig(rank=2), gan_step_counts=(4,))
    assert roles.discriminator is not None
    x, t, cond, _ = given(roles.backbone)
    with torch.no_grad():
        before = roles.tokens("teacher", x, t, cond)
        for role in ("student", "fake"):
            for p in roles.trained[role].values():
                p.add_(1.0)
        after = roles.tokens("teacher", x, t, cond)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert set(roles.trained) == {"student", "fake", "discriminator"}


def test_without_layers_it_says_what_to_do() -> None:
    backbone = Denoiser(nn.Linear(2, 2), tiny.TABLE, (2,))
    with pytest.raises(
        ValueError, match=r"^method\.gan: this network names no layers .*feature_layers.* or set method\.gan\.weight=0$"
    ):
        make_discriminator(backbone, backbone.module, (4,), seed=0)
