"""Checkpointed blocks give the gradients of their own role.

Their role is that of the forward pass, whoever the network is by the time of the backward pass.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.backbones.load import load_teacher
from fewstep.core.guidance import Guidance
from fewstep.methods.distribution_matching import DistributionMatching, matching_losses
from fewstep.methods.method import TrainBatch
from fewstep.roles.roles import Role, Roles, RolesConfig, make_roles

from .. import pipelines, tiny
from .common import given, perturb


@pytest.fixture(scope="module", params=["sd", "pixart", "cogvideox"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.save(request.param, tmp_path_factory.mktemp("checkpointing") / request.param)


def prepared(backbone: Backbone, checkpointing: bool, share: bool = True) -> Roles:
    roles = make_roles(backbone, RolesConfig(lora=share, rank=2, checkpointing=checkpointing), condition_values=(2, 1))
    perturb(roles, "student", 1, 0.02)
    perturb(roles, "fake", 2, 0.02)
    return roles


def gradients(roles: Roles) -> dict[Role, list[Tensor]]:
    """Those of one iteration; each backward pass comes after other roles have been called."""
    _, _, cond, null = given(roles.backbone)
    method = DistributionMatching(steps=(2, 1), warmup=0, guidance=Guidance(scale=3.0))
    found: dict[Role, list[Tensor]] = {}
    batch = TrainBatch(0, 1, 2, cond, null, None, torch.Generator().manual_seed(0))
    for loss in matching_losses(method, roles, batch):
        parameters = list(roles.trained[loss.role].values())
        grads = torch.autograd.grad(loss.value, parameters, allow_unused=True, retain_graph=True)
        found[loss.role] = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    return found


@pytest.mark.parametrize("share", [True, False])
def test_gradients_are_those_without_it(folder: Path, share: bool) -> None:
    plain = gradients(prepared(load_teacher(folder), False, share))
    saved = gradients(prepared(load_teacher(folder), True, share))
    for role, expected in plain.items():
        assert any(g.any() for g in expected)
        for a, b in zip(saved[role], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6 + 1e-4 * float(b.abs().max()))


def kept_for_backward(make: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = make()
    assert value.requires_grad
    return sum(storages.values())


def first_estimate(roles: Roles) -> Tensor:
    x, t, cond, _ = given(roles.backbone)
    return roles.denoise("student", cond)(x, t).x0.sum()


def test_less_is_kept(folder: Path) -> None:
    kept = {c: kept_for_backward(partial(first_estimate, prepared(load_teacher(folder), c))) for c in (False, True)}
    assert kept[True] < 0.8 * kept[False]


def test_the_next_run_on_the_same_teacher_is_not_checked() -> None:
    backbone = tiny.stable_diffusion()
    prepared(backbone, True)
    again, fresh = gradients(prepared(backbone, False)), gradients(prepared(tiny.stable_diffusion(), False))
    for role, expected in fresh.items():
        for a, b in zip(again[role], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6 + 1e-4 * float(b.abs().max()))


def test_networks_without_blocks_say_so() -> None:
    with pytest.raises(ValueError, match=r"roles\.checkpointing: a Net has no blocks to check"):
        make_roles(tiny.denoiser(), RolesConfig(rank=2, checkpointing=True))
