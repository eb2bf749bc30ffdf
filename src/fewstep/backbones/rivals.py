"""Public few-step students, and how each has to be sampled.

The settings are those of the model pages: scheduler, times, steps, guidance and strength of the LoRA.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)
from torch import Tensor

from ..reading import reading
from .families import family_of_pipeline
from .few_step import with_network
from .generate import device_of, noise_of
from .lora import USUAL
from .parts import denoiser_of

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
QWEN = "QwenImagePipeline"
TRAILING = {"timestep_spacing": "trailing"}
LORA = USUAL[0]


@dataclass(frozen=True)
class Rival:
    """A public student of pipelines of class `base`.

    `files` of the hub's `repo` are a LoRA, or a whole pipeline where there are none. `times` are passed where the
    student visits others than its scheduler's own. `call` are further arguments of the pipeline's call. `missing`
    says why it cannot be run.
    """

    name: str
    base: str
    repo: str
    files: tuple[str, ...] = ()
    scheduler: type[SchedulerMixin] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    times: tuple[int, ...] = ()
    guidance: float = 0.0
    strength: float = 1.0
    call: dict[str, Any] = field(default_factory=dict)
    kind: Literal["lora", "pipeline"] = "lora"
    missing: str = ""


def _pipeline(name: str, base: str, repo: str, steps: int, guidance: float, call: dict[str, Any]) -> Rival:
    return Rival(name, base, repo, steps=steps, guidance=guidance, call=call, kind="pipeline")


LIGHTNING = {  # shift 3 at every size
    "base_shift": 1.0986122886681098,
    "max_shift": 1.0986122886681098,
    "shift": 1.0,
    "shift_terminal": None,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}
RIVALS = (
    Rival("lcm-lora", SD, "latent-consistency/lcm-lora-sdv1-5", (LORA,), LCMScheduler, guidance=1.0),
    Rival("lcm-lora", SDXL, "latent-consistency/lcm-lora-sdxl", (LORA,), LCMScheduler, guidance=1.0),
    Rival("hyper-sd", SD, "ByteDance/Hyper-SD", ("Hyper-SD15-4steps-lora.safetensors",), DDIMScheduler, TRAILING),
    Rival("hyper-sd", SDXL, "ByteDance/Hyper-SD", ("Hyper-SDXL-4steps-lora.safetensors",), DDIMScheduler, TRAILING),
    Rival(
        "hyper-sd-1",
        SD,
        "ByteDance/Hyper-SD",
        ("Hyper-SD15-1step-lora.safetensors",),
        TCDScheduler,
        steps=1,
        call={"eta": 1.0},
    ),
    Rival(
        "hyper-sd-1",
        SDXL,
        "ByteDance/Hyper-SD",
        ("Hyper-SDXL-1step-lora.safetensors",),
        TCDScheduler,
        steps=1,
        times=(800,),
        call={"eta": 1.0},
    ),
    Rival("tcd", SD, "h1t/TCD-SD15-LoRA", (LORA,), TCDScheduler, call={"eta": 0.3}),
    Rival("tcd", SDXL, "h1t/TCD-SDXL-LoRA", (LORA,), TCDScheduler, call={"eta": 0.3}),
    Rival(
        "sdxl-lightning",
        SDXL,
        "ByteDance/SDXL-Lightning",
        ("sdxl_lightning_4step_lora.safetensors",),
        EulerDiscreteScheduler,
        TRAILING,
    ),
    Rival(
        "dmd2",
        SDXL,
        "tianweiy/DMD2",
        ("dmd2_sdxl_4step_lora_fp16.safetensors",),
        LCMScheduler,
        times=(999, 749, 499, 249),
    ),
    Rival(
        "sdxl-turbo",
        SDXL,
        "stabilityai/sdxl-turbo",
        (),
        EulerAncestralDiscreteScheduler,
        TRAILING,
        kind="pipeline",
    ),
    Rival("perflow", SD, "hansyan/perflow-sd15-delta-weights", missing="its scheduler is in no diffusers release"),
    Rival("tdm", SD, "Luo-Yihong/TDM", missing="its weights are a pickle, which nothing here reads"),
    Rival(
        "qwen-lightning",
        QWEN,
        "lightx2v/Qwen-Image-Lightning",
        ("Qwen-Image-Lightning-4steps-V1.0.safetensors",),
        FlowMatchEulerDiscreteScheduler,
        LIGHTNING,
        guidance=1.0,
        call={"true_cfg_scale": 1.0},
    ),
    _pipeline("klein", "Flux2KleinPipeline", "black-forest-labs/FLUX.2-klein-4B", 4, 1.0, {}),
    _pipeline("z-image-turbo", "ZImagePipeline", "Tongyi-MAI/Z-Image-Turbo", 9, 0.0, {}),
    _pipeline("krea-2-turbo", "Krea2Pipeline", "krea/Krea-2-Turbo", 8, 0.0, {}),
)


def rival_named(name: str, pipe: DiffusionPipeline) -> Rival:
    """Return the public student of this name on pipelines like `pipe`.

    Raises ValueError that lists those there are, and where it cannot be run.
    """
    base = family_of_pipeline(pipe).name
    mine = {r.name: r for r in RIVALS if r.base == base}
    found = mine.get(name)
    if found is None:
        there = f"of {base} there are {', '.join(mine)}" if mine else f"of {base} there are none"
        raise ValueError(f"--against: got {name}, {there}; choose one, or pass a student's folder")
    if found.missing:
        raise ValueError(f"--against: {name} cannot be run here: {found.missing}")
    return found


def rival_pipeline(base: DiffusionPipeline, rival: Rival, folder: Path) -> DiffusionPipeline:
    """Return the pipeline of a public student.

    `folder` holds its files. A LoRA is fused into a copy of the base's network at the student's strength, and the
    base stays as it is.
    """
    if rival.kind == "pipeline":
        with reading(f"--against: {folder}", "fetch it again"):
            found = DiffusionPipeline.from_pretrained(folder, torch_dtype=base.dtype).to(base.device)
        if rival.scheduler is not None:
            found.scheduler = rival.scheduler.from_config(found.scheduler.config, **rival.options)
        found.set_progress_bar_config(disable=True)
        return found
    assert rival.scheduler is not None
    scheduler = rival.scheduler.from_config(base.scheduler.config, **rival.options)
    pipe = with_network(base, copy.deepcopy(denoiser_of(base)), scheduler, family_of_pipeline(base).pipeline)
    pipe.load_lora_weights(str(folder), weight_name=rival.files[0], adapter_name="rival")
    pipe.fuse_lora(adapter_names=["rival"], lora_scale=rival.strength)
    pipe.unload_lora_weights()
    return pipe


def draw_rival(
    pipe: DiffusionPipeline, rival: Rival, prompts: Sequence[str], seeds: Sequence[int], shape: Sequence[int], size: int
) -> Tensor:
    """Sample one image per prompt and seed.

    Returns images [B, 3, H, W], from the noise that fewstep's students start from. `shape` is the shape of a state,
    and `size` the height and width of images. A pipeline with latents of another shape makes its own noise from the
    seeds.
    """
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    options: dict[str, Any] = dict(rival.call) | dict(family_of_pipeline(pipe).call_options(pipe))
    options |= {"timesteps": list(rival.times)} if rival.times else {"num_inference_steps": rival.steps}
    options |= {"height": size, "width": size} if size else {}
    if rival.kind == "lora":
        options["latents"] = noise_of(generators, shape).to(device_of(denoiser_of(pipe)), pipe.dtype)
    return pipe(
        prompt=list(prompts),
        guidance_scale=rival.guidance,
        generator=generators,
        output_type="pt",
        **options,
    ).images
