"""A base in fewer bits is near the base.

Its codes are the nearest ones. Its layers are those that the decoded weights would make, its teacher is near what it
was, and a LoRA trains beside it.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep.api import load_teacher
from fewstep.backbones.base import Backbone
from fewstep.core.guidance import Guidance
from fewstep.data.prompts import embed
from fewstep.methods.distribution_matching import DistributionMatching, matching_losses
from fewstep.methods.method import TrainBatch
from fewstep.roles import adapters
from fewstep.roles.quantized import (
    BLOCK,
    KINDS,
    NF4,
    Kind,
    QuantisedConv2d,
    QuantisedLinear,
    QuantizedWeight,
    kind_of,
    layers_of,
    quantize,
    weight_count,
)
from fewstep.roles.roles import TRAINED, RolesConfig, make_roles
from fewstep.training.ledger import MemoryTracker, module_bytes
from fewstep.training.loop import TrainConfig, distill

from .. import tiny
from ..training.common import digest
from .common import attached, given, perturb

LEVELS: dict[Kind, Tensor] = {"int8": torch.arange(-127, 128) / 127, "nf4": torch.tensor(NF4)}
FAR: dict[Kind, float] = {
    "int8": 0.011,
    "nf4": 0.15,
}  # relative error of the bundled teacher's prediction, at the worst of its times
LAYERS: dict[str, Callable[[], nn.Linear | nn.Conv2d]] = {
    "linear": lambda: nn.Linear(96, 128),
    "convolution": lambda: nn.Conv2d(96, 128, 3, stride=2, padding=1),
    "groups": lambda: nn.Conv2d(128, 128, 3, padding=2, dilation=2, groups=2, bias=False),
}


def wide() -> Backbone:
    return tiny.stable_diffusion(channels=(96, 128))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_weights_are_counted_without_adapters_and_as_what_they_stand_for(kind: Kind | None) -> None:
    backbone = wide()
    before = sum(p.numel() for p in backbone.module.parameters())
    make_roles(backbone, RolesConfig(rank=2, quantize=kind))
    assert weight_count(backbone.module) == before


def rounded(layer: nn.Linear | nn.Conv2d, kind: Kind) -> nn.Module:
    """The same layer, in a network of its own."""
    made = tiny.denoiser()
    made.module.add_module("layer", copy.deepcopy(layer))
    quantize(made, kind)
    return made.module.get_submodule("layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_the_nearest(kind: Kind, dtype: torch.dtype) -> None:
    """Against all levels of each block; a block of zeros and what is a level already come back as they were."""
    weight = torch.randn(4, 3 * BLOCK, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, :BLOCK] = 0
    packed = QuantizedWeight(weight, kind)
    found = packed().float().reshape(-1, BLOCK)
    assert packed().dtype == dtype and packed().shape == weight.shape
    choices = packed.scale.float()[..., None] * LEVELS[kind] * (127 if kind == "int8" else 1)  # [blocks, 1, levels]
    least = (weight.float().reshape(-1, BLOCK)[..., None] - choices).abs().amin(-1)
    off = (weight.float().reshape(-1, BLOCK) - found).abs()
    torch.testing.assert_close(off, least, rtol=0, atol=0.01 if dtype == torch.bfloat16 else 1e-6)
    assert not found[0].any()
    again = QuantizedWeight(packed().view(4, -1), kind)
    torch.testing.assert_close(again(), packed(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_and_its_gradient_are_those_of_the_decoded_weight(kind: Kind, name: str, autocast: bool) -> None:
    plain = LAYERS[name]().requires_grad_(False)
    layer = rounded(plain, kind)
    assert isinstance(layer, QuantisedLinear | QuantisedConv2d)
    plain.weight.copy_(layer.weight)
    x = torch.randn(
        (2, 5, 96) if name == "linear" else (2, plain.weight.shape[1] * getattr(plain, "groups", 1), 9, 9),
        requires_grad=True,
    )
    results = []
    for one in (plain, layer, copy.deepcopy(layer)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = one(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        results.append((y.float(), *torch.autograd.grad(y.float().square().sum(), x)))
    for found in results[1:]:
        for mine, wanted in zip(found, results[0], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_no_decoded_weight_is_kept_for_the_backward_pass(kind: Kind) -> None:
    layers = [rounded(nn.Linear(512, 512), kind) for _ in range(4)]
    x = torch.zeros(1, 512, requires_grad=True)
    with MemoryTracker() as ledger:
        y = x
        for layer in layers:
            y = layer(y)
        assert ledger.now < 64 * 2**10 < 512 * 512
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_the_bundled_teacher_is_near_what_it_was_in_a_fraction_of_its_memory(kind: Kind) -> None:
    """Measured as documented: 0.5-1.0 % of its prediction in int8, 3.7-13.7 % in nf4."""
    teacher, before = load_teacher("emoji"), load_teacher("emoji")
    quantize(teacher, kind)
    cond = teacher.encode(["rocket", "red heart", "dog face", "pizza"])
    x = torch.randn(4, *teacher.shape, generator=torch.Generator().manual_seed(0))
    for time in (999, 499, 50):
        t = torch.full((4,), float(time), dtype=torch.float64)
        with torch.no_grad():
            wanted, found = (b.predict(b.module, x, t, cond) for b in (before, teacher))
        assert 0 < (found - wanted).norm() < FAR[kind] * wanted.norm()
    bits = {"int8": 8 + 32 / BLOCK, "nf4": 4 + 32 / BLOCK}[kind]  # in single precision a scale has 32
    whole, plain = module_bytes(before.module), sum(4 * m.weight.numel() for m in layers_of(before))
    tables = sum(
        m.pairs.nbytes for m in teacher.module.modules() if isinstance(m, QuantizedWeight) and m.pairs is not None
    )
    assert plain > 0.9 * whole and tables < 0.01 * whole
    assert module_bytes(teacher.module) == whole - plain * (1 - bits / 32) + tables


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_beside_a_base_that_does_not_move(kind: Kind, checkpointing: bool) -> None:
    backbone = wide()
    roles = make_roles(backbone, RolesConfig(rank=2, quantize=kind, checkpointing=checkpointing))
    assert kind_of(backbone.module) == kind
    x, t, cond, null = given(backbone)
    with torch.no_grad():
        teacher = roles.teacher(cond, null, Guidance())(x, t).x0
        for role in TRAINED:
            assert torch.equal(roles.denoise(role, cond)(x, t).x0, teacher)
    before = digest(backbone.module)
    start = {r: {n: p.detach().clone() for n, p in roles.trained[r].items()} for r in TRAINED}
    data, method = (
        embed(backbone, tiny.WORDS, None, "wide"),
        DistributionMatching(steps=2, warmup=8, guidance=Guidance(scale=2.0)),
    )

    def loss() -> float:
        """The fake score's, at the same draws each time."""
        batch = TrainBatch(0, 10, 2, cond, null, None, torch.Generator().manual_seed(0))
        (one,) = matching_losses(method, roles, batch)
        return one.value.item()

    at_first = loss()
    for step in distill(roles, method, data, TrainConfig(iterations=10, batch=4, lr=1e-3, fake_lr=3e-3)):
        assert step.iteration != method.warmup or loss() < 0.99 * at_first
    for role in TRAINED:
        assert all(
            not torch.equal(p, start[role][n])
            for n, p in roles.trained[role].items()
            if "lora_B" in n and "to_" not in n
        )
    assert digest(backbone.module) == before
    with torch.no_grad():
        assert torch.equal(roles.teacher(cond, null, Guidance())(x, t).x0, teacher)


def test_checkpointed_gradients_are_those_without_it() -> None:
    found = []
    for checkpointing in (False, True):
        roles = make_roles(wide(), RolesConfig(rank=2, quantize="int8", checkpointing=checkpointing))
        perturb(roles, "student", 1, 0.02)
        x, t, cond, null = given(roles.backbone)
        value = roles.denoise("student", cond)(x, t).x0.square().sum()
        roles.teacher(cond, null, Guidance(scale=2.0))(x, t)
        found.append(torch.autograd.grad(value, list(roles.trained["student"].values())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_was_trained_goes_with_the_weights_as_they_were() -> None:
    """The same file, whichever base it was trained beside; with it the student is as far off as the teacher was."""
    roles = make_roles(wide(), RolesConfig(rank=2, quantize="int8"))
    perturb(roles, "student", 1, 0.02)
    plain = make_roles(wide(), RolesConfig(rank=2))
    assert {n: v.shape for n, v in roles.student_state().items()} == {
        n: v.shape for n, v in plain.student_state().items()
    }
    assert (
        type(
            next(
                m
                for m in adapters.adapter_layers(roles.backbone.module)
                if isinstance(m.get_base_layer(), QuantisedConv2d)
            ).lora_A["student"]
        )
        is nn.Conv2d
    )
    original = wide()
    student = attached(original, roles.student_state())
    x, t, cond, _ = given(original)
    with torch.no_grad():
        trained, served = roles.denoise("student", cond)(x, t).x0, student.denoise(cond)(x, t).x0
    assert 0 < (trained - served).norm() < 0.05 * served.norm()


def test_a_teacher_is_rounded_once() -> None:
    backbone = wide()
    make_roles(backbone, RolesConfig(rank=2, quantize="int8"))
    before = digest(backbone.module)
    make_roles(backbone, RolesConfig(rank=3, quantize="int8"))
    assert digest(backbone.module) == before
    for base, said in ((None, "null"), ("nf4", "nf4")):
        with pytest.raises(
            ValueError,
            match=rf"^roles\.quantize: got {said}, this teacher's weights are in int8 already; load the teacher again$",
        ):
            make_roles(backbone, RolesConfig(rank=2, quantize=base))  # type: ignore[arg-type]


def test_layers_without_a_parameter_take_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded layers have buffers alone, and PEFT asks the layers that it gets at a time for a parameter's device."""
    monkeypatch.setattr(adapters, "FEW", 1)
    backbone = wide()
    roles = make_roles(backbone, RolesConfig(rank=2, quantize="int8"))
    assert any(type(m) is QuantisedLinear and m.bias is None for m in backbone.module.modules())
    assert all(n.rpartition(".")[0] for n in roles.trained["student"])
    assert "tells_device" not in backbone.module.state_dict()


def test_what_is_small_and_what_is_told_stays_as_it_is() -> None:
    backbone = wide()
    names = {id(m): n for n, m in backbone.module.named_modules()}
    chosen = {names[id(m)] for m in layers_of(backbone)}
    assert chosen and not any(n.startswith("time_embedding.") for n in chosen)
    assert not chosen & {"conv_in", "conv_out"}


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^quantize: got 'int3', allowed are int8, nf4$"):
        RolesConfig(quantize="int3")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^quantize: got int8, which is for weights that stay as they are; set lora=True"
    ):
        replace(RolesConfig(lora=False), quantize="int8")
    with pytest.raises(
        ValueError,
        match=r"^roles\.quantize: got int8, this network has no layer of more than 64 channels; set it to null$",
    ):
        make_roles(tiny.denoiser(), RolesConfig(rank=2, quantize="int8"))
