"""Three roles share one copy of the weights.

At the start each is the teacher bit for bit, and gradients are exact in any order of calls.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fewstep.backbones.base import Backbone
from fewstep.core.guidance import Guidance
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles import adapters
from fewstep.roles.roles import TRAINED, Role, Roles, RolesConfig, make_roles
from fewstep.student.student import Student
from fewstep.training.ledger import MemoryTracker

from .. import tiny
from .common import ORIGIN, attached, given, perturb

BACKBONES: dict[str, Callable[[], Backbone]] = {
    "own": tiny.denoiser,
    "flow": tiny.flow_denoiser,
    "sd": tiny.stable_diffusion,
}


def storage_bytes(roles: Roles) -> int:
    """Bytes of all networks together, every storage counted once."""
    storages = {
        s.data_ptr(): s.nbytes() for n in roles.networks.values() for p in n.parameters() for s in [p.untyped_storage()]
    }
    return sum(storages.values())


def parameter_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("name", BACKBONES)
def test_all_roles_start_as_the_teacher_bit_for_bit(name: str) -> None:
    backbone = BACKBONES[name]()
    x, t, cond, null = given(backbone)
    with torch.no_grad():
        backbone.module.requires_grad_(False)
        alone = backbone.predict(backbone.module, x, t, cond)
        roles = make_roles(backbone, RolesConfig(rank=2))
        teacher = roles.teacher(cond, null, Guidance())(x, t)
        for role in TRAINED:
            assert torch.equal(roles.denoise(role, cond)(x, t).x0, teacher.x0)
        assert torch.equal(backbone.predict(backbone.module, x, t, cond), alone)


@pytest.mark.parametrize("name", BACKBONES)
def test_copies_start_with_the_teachers_weights(name: str) -> None:
    """Copies give the teacher's very bits, frozen as the teacher is.

    Where a weight is to be trained, torch's matmul goes another way, to another last bit.
    """
    backbone = BACKBONES[name]()
    x, t, cond, null = given(backbone)
    roles = make_roles(backbone, RolesConfig(lora=False))
    with torch.no_grad():
        for role in TRAINED:
            for (_, a), (_, b) in zip(
                roles.networks[role].state_dict().items(), backbone.module.state_dict().items(), strict=True
            ):
                assert torch.equal(a, b)
                assert a.data_ptr() != b.data_ptr()
            roles.networks[role].requires_grad_(False)
            assert torch.equal(roles.denoise(role, cond)(x, t).x0, roles.teacher(cond, null, Guidance())(x, t).x0)


@pytest.mark.parametrize("name", ["own", "sd"])
def test_sharing_keeps_one_copy_of_the_weights(name: str) -> None:
    backbone = BACKBONES[name]()
    base = parameter_bytes(backbone.module)
    roles = make_roles(backbone, RolesConfig(rank=2))
    lora = sum(p.numel() * p.element_size() for role in TRAINED for p in roles.trained[role].values())
    assert storage_bytes(roles) == base + lora
    assert len({id(n) for n in roles.networks.values()}) == 1
    copies = make_roles(BACKBONES[name](), RolesConfig(lora=False))
    assert storage_bytes(copies) == 3 * base


@pytest.mark.parametrize("share", [True, False])
def test_only_the_two_trained_roles_can_be_trained(share: bool) -> None:
    roles = make_roles(tiny.denoiser(), RolesConfig(lora=share, rank=2))
    wanted = {id(p) for role in TRAINED for p in roles.trained[role].values()}
    can = {id(p) for n in roles.networks.values() for p in n.parameters() if p.requires_grad}
    assert can == wanted
    assert len(wanted) == sum(len(roles.trained[role]) for role in TRAINED)
    assert not any(n.training for n in roles.networks.values())


def merged_copies(shared: Roles, fresh: Backbone) -> Roles:
    """Full copies whose weights are `W + B A` of the shared roles' adapters."""
    copies = make_roles(fresh, RolesConfig(lora=False))
    with torch.no_grad():
        for role in TRAINED:
            state = adapters.adapter_state(shared.networks[role], role)
            for name in {k.rsplit(".lora_", 1)[0] for k in state}:
                a, b = (state[f"{name}.lora_{ab}.weight"] for ab in "AB")
                weight = copies.trained[role][f"{name}.weight"]
                weight.add_((b.flatten(1) @ a.flatten(1)).reshape(weight.shape))
    return copies


def through_lora(roles: Roles, role: Role, full: dict[str, Tensor]) -> dict[str, Tensor]:
    """`dL/dB = G A', dL/dA = B' G`, the chain rule.

    G is the gradient on the whole weight. The names are those of the shared role.
    """
    found = {}
    for name, p in roles.trained[role].items():
        layer, _, rest = name.partition(".lora_")
        gradient = full[f"{layer}.weight"].flatten(1)
        other = roles.trained[role][f"{layer}.lora_{'B' if rest[0] == 'A' else 'A'}.{role}.weight"].detach().flatten(1)
        found[name] = (other.T @ gradient if rest[0] == "A" else gradient @ other.T).reshape(p.shape)
    return found


@pytest.mark.parametrize("name", ["own", "sd"])
def test_gradients_are_exact_whatever_is_called_before_the_backward_pass(name: str) -> None:
    """Shared weights give the gradients of separate copies.

    The forward passes of student, teacher and fake score come before the student's backward pass, and the fake
    score's backward pass comes last.
    """
    shared = make_roles(BACKBONES[name](), RolesConfig(rank=2))
    for seed, role in enumerate(TRAINED):
        perturb(shared, role, seed)
    copies = merged_copies(shared, BACKBONES[name]())
    x, t, cond, null = given(shared.backbone)
    outputs, gradients = [], []
    for roles in (shared, copies):
        student = roles.denoise("student", cond)(x, t).x0
        teacher = roles.teacher(cond, null, Guidance(scale=3.5))(x, t).x0
        fake = roles.denoise("fake", cond)(x, t).x0
        outputs.append((student, teacher, fake))
        loss = (student * (teacher - fake).detach()).sum()
        on_student = torch.autograd.grad(loss, list(roles.trained["student"].values()), allow_unused=True)
        on_fake = torch.autograd.grad(fake.square().mean(), list(roles.trained["fake"].values()), allow_unused=True)
        gradients.append(
            [dict(zip(roles.trained[r], g, strict=True)) for r, g in zip(TRAINED, (on_student, on_fake), strict=True)]
        )
    for mine, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    for i, role in enumerate(TRAINED):
        expected = through_lora(shared, role, gradients[1][i])
        assert len(expected) == len(gradients[0][i])
        for key, g in gradients[0][i].items():
            assert (g - expected[key]).norm() <= 1e-3 * expected[key].norm() + 1e-6, key
        assert sum(float(g.norm()) > 0 for g in expected.values()) > 0.9 * len(expected)


def test_one_role_has_no_gradient_from_another() -> None:
    roles = make_roles(tiny.denoiser(), RolesConfig(rank=2))
    x, t, cond, _ = given(roles.backbone)
    for role, other in (TRAINED, TRAINED[::-1]):
        perturb(roles, role, 0)
        value = roles.denoise(role, cond)(x, t).x0.sum()
        roles.denoise(other, cond)(x, t)
        assert all(
            g is None
            for g in torch.autograd.grad(
                value, list(roles.trained[other].values()), allow_unused=True, retain_graph=True
            )
        )
        assert all(
            g is not None for g in torch.autograd.grad(value, list(roles.trained[role].values()), allow_unused=True)
        )


@pytest.mark.parametrize("share", [True, False])
def test_the_backbone_is_the_teacher_between_calls(share: bool) -> None:
    """The backbone is the teacher, not the role that was called last.

    This holds for whoever holds the backbone, to sample the teacher or to hash it.
    """
    backbone = tiny.denoiser()
    x, t, cond, _ = given(backbone)
    roles = make_roles(backbone, RolesConfig(lora=share, rank=2))
    with torch.no_grad():
        before = backbone.predict(backbone.module, x, t, cond)
        for role in TRAINED:
            perturb(roles, role, 1)
            assert not torch.equal(roles.denoise(role, cond)(x, t).x0, roles.teacher(cond, cond, Guidance())(x, t).x0)
            roles.denoise(role, cond)(x, t)
            assert torch.equal(backbone.predict(backbone.module, x, t, cond), before)


@pytest.mark.parametrize("share", [True, False])
def test_average_of_the_student(share: bool) -> None:
    """`average <- decay average + (1 - decay) student`, shown in place of the student and gone again."""
    roles = make_roles(tiny.denoiser(), RolesConfig(lora=share, rank=2))
    x, t, cond, _ = given(roles.backbone)
    start = {n: v.clone() for n, v in roles.average.items()}
    perturb(roles, "student", 1)
    one = {n: p.detach().clone() for n, p in roles.trained["student"].items()}
    roles.update_average(0.75)
    perturb(roles, "student", 2)
    two = {n: p.detach().clone() for n, p in roles.trained["student"].items()}
    roles.update_average(0.5)
    for n, value in roles.average.items():
        torch.testing.assert_close(value, 0.5 * (0.75 * start[n] + 0.25 * one[n]) + 0.5 * two[n])
    average = {n: v.clone() for n, v in roles.average.items()}
    with torch.no_grad():
        live = roles.denoise("student", cond)(x, t).x0
        with roles.averaged():
            assert not torch.equal(roles.denoise("student", cond)(x, t).x0, live)
            assert all(torch.equal(p, average[n]) for n, p in roles.trained["student"].items())
            with roles.averaged():  # a block in a block changes nothing
                pass
            assert all(torch.equal(p, average[n]) for n, p in roles.trained["student"].items())
        assert torch.equal(roles.denoise("student", cond)(x, t).x0, live)
    assert all(torch.equal(v, average[n]) for n, v in roles.average.items())


def test_the_average_in_use_takes_no_memory() -> None:
    roles = make_roles(tiny.denoiser(), RolesConfig(lora=False))
    with MemoryTracker() as ledger:
        ledger.add(*roles.average.values(), *roles.trained["student"].values())
        before = ledger.now
        with roles.averaged():
            pass
    assert ledger.peak == before


def test_student_state_is_a_copy_of_the_lora_or_of_the_network() -> None:
    shared = make_roles(tiny.denoiser(), RolesConfig(rank=2))
    state = shared.student_state()
    assert all(".lora_" in k and "student" not in k for k in state)
    perturb(shared, "student", 0)
    assert all(not torch.equal(v, state[k]) for k, v in shared.student_state().items())
    plain, settings = adapters.plain_state(shared.backbone.module, "student")
    assert all(torch.equal(v, plain[k]) for k, v in shared.student_state().items())
    assert (settings["r"], settings["lora_alpha"]) == (2, 2)

    copies = make_roles(tiny.denoiser(), RolesConfig(lora=False))
    assert list(copies.student_state()) == list(tiny.denoiser().module.state_dict())
    assert Student.of(copies, DistributionMatching(), ORIGIN).adapter is None


def test_a_lora_is_right_at_strength_one_whatever_its_alpha() -> None:
    """A LoRA's scale is in its weights.

    Read with alpha = rank it is the student, and a run of any alpha can begin with it.
    """
    backbone = tiny.denoiser()
    x, t, cond, _ = given(backbone)
    roles = make_roles(backbone, RolesConfig(rank=2, alpha=8))
    perturb(roles, "student", 1)
    state = roles.student_state()
    plain, settings = adapters.plain_state(backbone.module, "student")
    assert settings["lora_alpha"] == 2
    assert all(torch.equal(v, plain[k]) for k, v in state.items())
    with torch.no_grad():
        wanted = roles.denoise("student", cond)(x, t).x0
        torch.testing.assert_close(attached(tiny.denoiser(), state).denoise(cond)(x, t).x0, wanted)
        other = make_roles(tiny.denoiser(), RolesConfig(rank=2, alpha=1))
        other.start_from(state)
        torch.testing.assert_close(other.denoise("student", cond)(x, t).x0, wanted)
    with pytest.raises(ValueError, match=r"^alpha: got -1, allowed are numbers above 0"):
        RolesConfig(alpha=-1)


def test_a_second_run_on_the_same_teacher_starts_anew() -> None:
    """The same teacher serves a second run in one session. The first run's student says that its network has gone."""
    backbone = tiny.denoiser()
    x, t, cond, null = given(backbone)
    first = make_roles(backbone, RolesConfig(rank=2))
    perturb(first, "student", 0)
    second = make_roles(backbone, RolesConfig(rank=3))
    with torch.no_grad():
        assert torch.equal(second.denoise("student", cond)(x, t).x0, second.teacher(cond, null, Guidance())(x, t).x0)
        with pytest.raises(ValueError, match="student: its network has gone to another run on the same teacher"):
            first.denoise("student", cond)(x, t)
    copies = make_roles(backbone, RolesConfig(lora=False))
    assert list(copies.trained["student"]) == [n for n, _ in tiny.denoiser().module.named_parameters()]


def test_finished_students_live_beside_each_other_and_the_teacher() -> None:
    backbone = tiny.denoiser()
    x, t, cond, null = given(backbone)
    roles = make_roles(backbone, RolesConfig(rank=2))
    states, wanted = [], []
    with torch.no_grad():
        teacher = roles.teacher(cond, null, Guidance())(x, t).x0
        for seed in (1, 2):
            perturb(roles, "student", seed)
            states.append(roles.student_state())
            wanted.append(roles.denoise("student", cond)(x, t).x0)
        fresh = tiny.denoiser()
        students = [attached(fresh, state) for state in states]
        for student, x0 in zip(students, wanted, strict=True):
            torch.testing.assert_close(student.denoise(cond)(x, t).x0, x0, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            fresh.predict(fresh.module, x, t, cond), backbone.predict(backbone.module, x, t, cond), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            make_roles(fresh, RolesConfig(rank=2)).teacher(cond, null, Guidance())(x, t).x0,
            teacher,
            rtol=1e-5,
            atol=1e-6,
        )


def test_a_lora_of_another_network_is_refused() -> None:
    state = make_roles(tiny.denoiser(), RolesConfig(rank=2)).student_state()
    with pytest.raises(ValueError, match=r"student: the base network has no layer gone\.inp \(5 of 5 are missing\)"):
        attached(tiny.denoiser(), {f"gone.{k}": v for k, v in state.items()})


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^rank: got -1, allowed are whole numbers from 0"):
        RolesConfig(rank=-1)
    with pytest.raises(
        ValueError, match=r"^rank: got 2147483648, allowed are whole numbers from 0 to 4096 \(0: no LoRA\)"
    ):
        RolesConfig(rank=2**31)


def test_copies_of_half_precision_weights_are_refused_with_one_line() -> None:
    backbone = tiny.denoiser()
    backbone.module.to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"roles\.lora: got false, which trains weights that are bfloat16 here .* set dtype to float32"
    ):
        make_roles(backbone, RolesConfig(lora=False))
    make_roles(backbone, RolesConfig(lora=True))  # the adapters are in single precision
