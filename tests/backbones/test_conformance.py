"""`conformance` describes a teacher and refuses a wrong one.

A wrong one has settings that are not read, numbers that are not finite, or images that are black.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.backbones.base import Cond
from fewstep.backbones.conformance import conformance
from fewstep.backbones.load import around
from fewstep.backbones.parts import able_to_single, frozen, single_output
from fewstep.backbones.sd import StableDiffusion
from fewstep.core.schedule import VP
from fewstep.findings import Check, require

from .. import pipelines, tiny


def named(checks: list[Check]) -> dict[str, Check]:
    return {c.name: c for c in checks}


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_every_family_conforms(family: str) -> None:
    checks = named(conformance(around(frozen(pipelines.FAMILIES[family](), torch.float32), "tiny")))
    assert all(c.holds and c.said for c in checks.values()), [c for c in checks.values() if not c.holds]
    assert checks["diffusers"].said.startswith("images of 2 steps at guidance 3 differ by ")
    assert "of the images' spread" in checks["diffusers"].said
    require(list(checks.values()), "teacher: tiny")


def test_what_is_said() -> None:
    checks = named(conformance(tiny.stable_diffusion()))
    assert checks["model"].said.startswith("StableDiffusionPipeline, UNet2DConditionModel of 0.3 M weights in float32")
    assert checks["predicts"].said.startswith("v; an error of its output is 1 times as large")
    assert checks["schedule"].said == "a table of 1000 times, zero terminal SNR"
    assert checks["states"].said == "[4, 8, 8], images 16 x 16"
    assert checks["not read"].said == "nothing"
    sdxl = pipelines.sdxl()
    assert "terminal SNR 0.0047" in named(conformance(around(sdxl, "tiny")))["schedule"].said
    own = conformance(tiny.denoiser())
    assert all(c.holds for c in own) and "diffusers" not in named(own)
    assert named(own)["predicts"].said.startswith("v;")
    assert "flow, shift 3" in named(conformance(around(pipelines.sd3(), "tiny")))["schedule"].said
    pixels = conformance(tiny.pixels())
    assert all(c.holds for c in pixels), pixels


class Wrong(StableDiffusion):
    """A backbone that leaves something out: a weaker text, as with a setting that is not read."""

    def encode(self, prompts: Any) -> Cond:
        return {k: 0.9 * v for k, v in super().encode(prompts).items()}


def test_a_setting_that_is_not_read_is_seen_in_the_images() -> None:
    right = tiny.stable_diffusion()
    wrong = Wrong(right.pipe, right.name, right.schedule)
    failed = [c for c in conformance(wrong) if not c.holds]
    assert [c.name for c in failed] == ["diffusers"]
    with pytest.raises(
        ValueError,
        match=r"^teacher: tiny: images of 2 steps at guidance 3 differ by .* \(allowed in float32: 0.001\); a setting",
    ):
        require(failed, "teacher: tiny")


def test_another_schedule_is_seen_in_the_images() -> None:
    right = tiny.stable_diffusion()
    wrong = replace(right, schedule=VP(right.schedule.alpha_bar.sqrt()))  # type: ignore[attr-defined]
    assert [c.name for c in conformance(wrong) if not c.holds] == ["diffusers"]


def broken(part: str, value: float) -> list[str]:
    teacher = tiny.stable_diffusion()
    network = getattr(teacher.pipe, part)
    with torch.no_grad():
        list(network.parameters())[-1].fill_(value)
    return [c.name for c in conformance(teacher) if not c.holds]


def test_numbers_that_are_not_finite() -> None:
    assert broken("unet", float("nan")) == ["noisiest time", "cleanest time"]
    assert broken("text_encoder", float("inf"))[0] == "text"
    assert broken("vae", float("nan")) == ["decoder"]


def test_images_of_one_colour() -> None:
    teacher = tiny.stable_diffusion()
    with torch.no_grad():
        for p in teacher.pipe.vae.decoder.conv_out.parameters():
            p.zero_()
    assert [c.name for c in conformance(teacher) if not c.holds] == ["images"]


def test_half_precision_is_held_to_what_it_can_do() -> None:
    pipe = frozen(tiny.pipeline(), torch.bfloat16)
    checks = named(conformance(around(pipe, "tiny")))
    assert all(c.holds for c in checks.values()), checks
    assert "allowed in bfloat16: 0.5" in checks["diffusers"].said and "bfloat16" in checks["model"].said
    pixels = tiny.pixels()
    pixels.module.to(torch.bfloat16)
    checks = named(conformance(pixels))
    assert all(c.holds for c in checks.values()), checks
    assert "allowed in float32: 0.001" in checks["diffusers"].said and "bfloat16" in checks["model"].said


def test_the_last_layer_is_calculated_in_single_precision() -> None:
    """The last layer is calculated in single precision.

    This holds under autocast and of weights in half precision. The error that is left comes from the layers before
    it. Other layers do not change.
    """
    torch.manual_seed(0)
    net, wide = nn.Sequential(), nn.Conv2d(64, 4, 3, padding=1)
    net.add_module("conv_out", wide)
    x = torch.randn(2, 64, 8, 8).bfloat16()
    with torch.no_grad():
        exact = wide(x.float())
        able_to_single(net)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(x)
            with single_output(net):
                single = net(x)
        assert (rounded.dtype, single.dtype) == (torch.bfloat16, torch.float32)
        assert float((single - exact).abs().max()) < 1e-5 < 1e-3 < float((rounded.float() - exact).abs().max())
        net.bfloat16()
        assert net(x).dtype == torch.bfloat16
        with single_output(net):
            assert net(x).dtype == torch.float32


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_every_family_says_what_it_says_in_single_precision(family: str) -> None:
    """Half precision's predictions are no multiples of its rounding."""
    teacher = around(frozen(pipelines.FAMILIES[family](), torch.bfloat16), "tiny")
    x, t = torch.randn(1, *teacher.shape), torch.full((1,), teacher.schedule.t_max, dtype=torch.float64)
    with torch.no_grad():
        m = teacher.predict(teacher.module, x, t, teacher.encode(["red cat"]))
    assert not torch.equal(m, m.bfloat16().float())
