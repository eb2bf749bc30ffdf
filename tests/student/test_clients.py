"""What a model card says of other programs: what to choose there, and what they cannot do."""

from dataclasses import replace
from typing import Any

import pytest

from fewstep.backbones.families import FAMILIES
from fewstep.backbones.few_step import PipelineInfo
from fewstep.core.schedule import Flow, Schedule
from fewstep.student.card import StudentCard
from fewstep.student.clients import other_programs

from .card import CARD
from .programs import BETAS, EPS, UNREAD, ZERO, V, on, process

SD = PipelineInfo(FAMILIES["StableDiffusionPipeline"], "unet", loads_lora=True, told_by="timesteps")
SD3 = PipelineInfo(FAMILIES["StableDiffusion3Pipeline"], "transformer", loads_lora=True, told_by="sigmas")
LAYER = "down_blocks.0.resnets.0.conv1"


def said(
    card: StudentCard,
    info: PipelineInfo = SD,
    config: dict[str, Any] = EPS,
    schedule: Schedule | None = None,
    layers: tuple[str, ...] = (LAYER,),
) -> str:
    return other_programs(card, info, schedule or process(config), config, "x-kohya.safetensors", layers, "final")


@pytest.mark.parametrize(
    ("config", "solver", "expected"),
    [
        (EPS, "ddim", "sampler Euler, schedule type Simple, 4 steps, CFG scale 1; which has exactly its times"),
        (
            V,
            "dpmpp",
            "sampler DPM++ 2M, schedule type Simple, 4 steps, CFG scale 1, the base set to v-prediction; "
            "which has exactly",
        ),
        (
            ZERO,
            "ddim",
            "CFG scale 1, the base set to v-prediction and zero terminal SNR; which has exactly its times",
        ),
    ],
)
def test_a1111_is_told_its_sampler_and_its_schedule(config: dict[str, Any], solver: str, expected: str) -> None:
    page = said(on(process(config), 4, solver=solver), config=config)
    assert expected in page
    assert "ComfyUI: drop `comfyui-workflow.json` on its window. It loads `model.safetensors`" in page
    assert "leave out" not in page


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (on(process(EPS), 3), "which is off by one of 1000 times at most"),
        (on(process(EPS), 7), "which is off by one of 1000 times at most"),
        (on(process(EPS), 4, 2.0), "A1111, Forge: none of their schedules has this student's times."),
        (on(process(EPS), 4, solver="renoise"), "A1111, Forge: they have no sampler that steps as this student does."),
        (
            replace(CARD, head="span"),
            "There is no workflow for ComfyUI: it has no sampler like this student's (a head).",
        ),
        (
            replace(CARD, base="somebody/their-model"),
            "no file of the base is known that it could load. "
            "`fewstep export final OUT --base FILE.safetensors` writes one",
        ),
    ],
)
def test_what_is_not_to_be_had_is_said(card: StudentCard, expected: str) -> None:
    assert expected in said(card)


def test_a_base_of_other_noise_levels_is_for_none_of_them() -> None:
    page = said(replace(CARD, base="emoji"), config=BETAS)
    assert "ComfyUI, A1111 and Forge cannot sample it: their noise levels are Stable Diffusion's" in page
    assert "Simple" not in page and "--base" not in page


def test_layers_that_some_programs_leave_out_are_named() -> None:
    assert f"leave out 4 of its 5 layers ({', '.join(UNREAD)}); there use `fewstep export --format merged`" in said(
        CARD, layers=(LAYER, *UNREAD)
    )
    told = said(replace(CARD, time_layer=UNREAD[-1]), layers=(LAYER, UNREAD[-1]))
    assert f"leave out 1 of its 2 layers ({UNREAD[-1]}); {UNREAD[-1]} says its step count" in told


def test_a_transformer_is_for_comfyui_and_diffusers() -> None:
    schedule = Flow(shift=3.0)
    page = said(on(schedule, base="stabilityai/stable-diffusion-3-medium-diffusers"), SD3, {"shift": 3.0}, schedule)
    assert (
        "the names that ComfyUI and diffusers read" in page
        and "It loads `sd3_medium_incl_clips_t5xxlfp8.safetensors`" in page
    )
    assert "A1111" not in page
    assert other_programs(CARD, SD, process(EPS), EPS, "", (), "final") == ""
