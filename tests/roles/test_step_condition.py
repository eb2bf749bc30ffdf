"""The step count as a condition: nothing at first, its own for each role and count, and foldable into plain weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.backbones.base import Backbone, Denoiser
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import Flow
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles import adapters
from fewstep.roles.roles import CONDITION, TRAINED, Roles, RolesConfig, make_roles
from fewstep.roles.step_condition import GAIN, attach, folded, nearest, unfold, without_fold
from fewstep.student.folder import Parts, read_lora
from fewstep.student.student import Student

from .. import tiny
from .common import ORIGIN, given, perturb

COUNTS = (2, 1)
BACKBONES: dict[str, Callable[[], Backbone]] = {"own": tiny.denoiser, "sd": tiny.stable_diffusion}


def make(name: str = "own", share: bool = True, alpha: float | None = None) -> Roles:
    return make_roles(BACKBONES[name](), RolesConfig(lora=share, rank=4, alpha=alpha), condition_values=COUNTS)


def at_grid(roles: Roles, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """States at the times that this count visits."""
    times = timegrid.uniform(roles.backbone.schedule, count)[:-1]
    x = torch.randn((count, *roles.backbone.shape), generator=torch.Generator().manual_seed(1))
    return x, times, dict(roles.backbone.encode(["red cat"] * count))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_it_is_nothing_at_first(name: str, share: bool) -> None:
    """At first the condition changes no bit, in copies too.

    The networks are frozen as the teacher is, since torch's matmul goes another way where a weight is to be trained.
    """
    roles = make(name, share)
    for network in roles.networks.values():
        network.requires_grad_(False)
    x, t, cond, null = given(roles.backbone)
    with torch.no_grad():
        teacher = roles.teacher(cond, null, Guidance())(x, t).x0
        for role in TRAINED:
            for count in COUNTS:
                assert torch.equal(roles.denoise(role, cond, count)(x, t).x0, teacher)


@pytest.mark.parametrize("share", [True, False])
def test_each_role_and_count_has_its_own(share: bool) -> None:
    roles = make(share=share)
    x, t, cond, null = given(roles.backbone)
    with torch.no_grad():
        before = {(r, k): roles.denoise(r, cond, k)(x, t).x0 for r in TRAINED for k in COUNTS}
        teacher = roles.teacher(cond, null, Guidance())(x, t).x0
        roles.trained["student"][CONDITION][1].add_(0.1)  # told "1 step"
        for (role, count), x0 in before.items():
            assert torch.equal(roles.denoise(role, cond, count)(x, t).x0, x0) == ((role, count) != ("student", 1))
        assert torch.equal(roles.teacher(cond, null, Guidance())(x, t).x0, teacher)
        assert torch.equal(roles.denoise("student", cond)(x, t).x0, before["student", 2])  # the first count by default


@pytest.mark.parametrize("share", [True, False])
def test_it_is_trained_by_its_own_role_and_count(share: bool) -> None:
    roles = make(share=share)
    x, t, cond, _ = given(roles.backbone)
    loss = roles.denoise("student", cond, 1)(x, t).x0.square().sum()
    roles.denoise("fake", cond, 2)(x, t)  # another role in between
    mine, other = torch.autograd.grad(loss, [roles.trained[r][CONDITION] for r in TRAINED], allow_unused=True)
    assert other is None
    assert bool(mine[COUNTS.index(1)].all())
    assert not bool(mine[COUNTS.index(2)].any())


def test_it_is_averaged_and_taken_along() -> None:
    roles = make()
    with torch.no_grad():
        roles.trained["student"][CONDITION].add_(1.0)
    roles.update_average(0.75)
    torch.testing.assert_close(roles.average[CONDITION], torch.full((2, 8), 0.25))
    with roles.averaged():
        assert all(torch.equal(v, torch.full((8,), 0.25 * GAIN)) for v in roles.vectors().values())
    assert list(roles.vectors()) == [2, 1]


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", BACKBONES)
def test_folded_into_a_lora_it_is_the_student_of_that_count(
    name: str, count: int, alpha: float | None, tmp_path: Path
) -> None:
    roles = make(name, alpha=alpha)
    perturb(roles, "student", 0)
    x, t, cond = at_grid(roles, count)
    with torch.no_grad():
        wanted = roles.denoise("student", cond, count)(x, t).x0
        whole = Student.of(roles, DistributionMatching(steps=COUNTS), ORIGIN)
        single, layer = whole.single(count), roles.backbone.time_layer
        state = read_lora(single.write(tmp_path / "written"))
        assert {s.shape[0] for k, s in state.items() if "lora_A" in k} == {4}  # no layer of another rank
        plain = Student.from_parts(Parts(single.card, state), BACKBONES[name]())
        torch.testing.assert_close(plain.denoise(cond)(x, t).x0, wanted, rtol=1e-4, atol=1e-4)
        bare = Student.from_parts(Parts(single.card, without_fold(state, layer)), BACKBONES[name]())
        assert (bare.denoise(cond)(x, t).x0 - wanted).abs().max() > 1e-3  # the fold is needed
        parts = Parts(whole.card, without_fold(state, layer), vectors=roles.vectors())
        student = Student.from_parts(parts, BACKBONES[name]())
        for k in COUNTS:
            torch.testing.assert_close(
                student.denoise(cond, k)(x, t).x0, roles.denoise("student", cond, k)(x, t).x0, rtol=1e-5, atol=1e-5
            )
        again = read_lora(student.single(count).write(tmp_path / "again"))
        for key, tensor in state.items():
            torch.testing.assert_close(again[key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_folded_into_the_time_layer_it_is_the_student_of_that_count(bias: bool) -> None:
    """Into the bias, or into the weight of a layer without one."""
    roles = make("sd", share=False)
    layer = roles.backbone.time_layer
    if not bias:
        for net in roles.networks.values():
            net.get_submodule(layer).register_parameter("bias", None)
    perturb(roles, "student", 0, size=0.02)
    network = roles.networks["student"]
    x, t, cond = at_grid(roles, 2)
    with torch.no_grad():
        wanted = roles.denoise("student", cond, 2)(x, t).x0
        times = DistributionMatching(steps=2).times(roles.backbone.schedule)[:-1]
        with folded(roles.backbone, network, roles.vectors()[2], times):
            alone = copy.deepcopy(network)
        torch.testing.assert_close(roles.denoise("student", cond, 2)(x, t).x0, wanted, rtol=0, atol=0)
        own = Roles(
            backbone=roles.backbone,
            networks={**roles.networks, "student": alone},
            trained=roles.trained,
            layers=(),
            config=roles.config,
        )
        torch.testing.assert_close(own.denoise("student", cond)(x, t).x0, wanted, rtol=1e-5, atol=1e-5)
        unfold(roles.backbone, alone, roles.vectors()[2], times)
        for name, weight in network.get_submodule(layer).named_parameters():
            torch.testing.assert_close(alone.get_submodule(layer).get_parameter(name), weight)


def test_taking_out_a_folded_lora_leaves_other_adapters() -> None:
    net = nn.Sequential(nn.Linear(3, 5))
    for name in ("mine", "theirs"):
        adapters.add_adapter(net, name, 2, 2, ["0"], seed=0)
        adapters.load_adapter(net, name, {"0.lora_A.weight": torch.ones(2, 3), "0.lora_B.weight": torch.ones(5, 2)})
    backbone = Denoiser(net, Flow(), (3,), "flow")
    object.__setattr__(backbone, "time_layer", "0")
    unfold(backbone, net, torch.zeros(5), torch.ones(1), "mine")
    assert not adapters.adapter_state(net, "mine")["0.lora_B.weight"].any()
    assert adapters.adapter_state(net, "theirs")["0.lora_B.weight"].all()


def test_nearest_count() -> None:
    known = {4.0: torch.tensor(4), 1.0: torch.tensor(1)}
    assert [int(nearest(known, k)) for k in (1, 2, 3, 4, 8)] == [1, 4, 4, 4, 4]


def test_a_network_that_names_no_layer_is_told_what_to_do() -> None:
    backbone = tiny.denoiser()
    nameless = Denoiser(backbone.module, backbone.schedule, backbone.shape, "v")
    with pytest.raises(
        ValueError,
        match=r"^method.steps: several step counts need .*Denoiser\(time_layer=\.\.\.\), "
        r"or set method.condition=false$",
    ):
        make_roles(nameless, RolesConfig(), condition_values=COUNTS)
    with pytest.raises(ValueError, match="several step counts need"):
        attach(backbone.module, "")
