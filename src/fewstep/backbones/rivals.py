"""Public few-step students, and how each has to be sampled.

The settings are those that `source` gives: scheduler, times, steps, guidance and strength of the LoRA.
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
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)
from torch import Tensor

from ..reading import reading
from ..tensors import read_tensors
from .families import family_of_pipeline
from .few_step import with_network
from .generate import device_of, noise_of
from .lora import USUAL
from .parts import denoiser_of

SD, SDXL, SD3 = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"
QWEN = "QwenImagePipeline"
TRAILING = {"timestep_spacing": "trailing"}
LORA = USUAL[0]
PICKLE = "its weights are a pickle, which nothing here reads"


@dataclass(frozen=True)
class Rival:
    """A public student of pipelines of class `base`.

    `files` of the hub's `repo` are of a `kind`: a LoRA, or all weights of the network, or a whole pipeline where there
    are none. A LoRA without a name is the one safetensors file of its repository. `of` names the weights that it was
    made from, where the class has several. `times` are passed where the student visits others than its scheduler's
    own; without a `scheduler` that of the base stays. `size` is the side of its images where it is not the base's.
    `call` are further arguments of the pipeline's call. `source` is where the settings stand, `unchecked` what could
    not be read there, and `missing` why it cannot be run.
    """

    name: str
    base: str
    repo: str
    source: str
    files: tuple[str, ...] = ()
    scheduler: type[SchedulerMixin] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    times: tuple[int, ...] = ()
    guidance: float = 0.0
    strength: float = 1.0
    size: int = 0
    call: dict[str, Any] = field(default_factory=dict)
    kind: Literal["lora", "network", "pipeline"] = "lora"
    of: str = ""
    unchecked: str = ""
    missing: str = ""


HYPER = "https://huggingface.co/ByteDance/Hyper-SD"
LCM = "https://huggingface.co/latent-consistency"
TCD = "https://github.com/jabir-zheng/TCD"
LIGHT = "https://huggingface.co/ByteDance/SDXL-Lightning"
TDM = "https://github.com/Luo-Yihong/TDM"
QWEN_LIGHT = "https://github.com/ModelTC/Qwen-Image-Lightning"
SHIFT_3 = {  # at every size
    "base_shift": 1.0986122886681098,
    "max_shift": 1.0986122886681098,
    "shift": 1.0,
    "shift_terminal": None,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}
FLOW_6 = {
    "algorithm_type": "dpmsolver++",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 6.0,
    "use_dynamic_shifting": False,
}
NAME = "the name of its file"


def _hyper(name: str, base: str, file: str, kind: Literal["lora", "network"] = "lora", **how: Any) -> Rival:
    return Rival(name, base, "ByteDance/Hyper-SD", HYPER, (file,), kind=kind, **how)


def _qwen(name: str, repo: str, file: str, of: str) -> Rival:
    how: dict[str, Any] = {"options": SHIFT_3, "guidance": 1.0, "call": {"true_cfg_scale": 1.0}, "of": of}
    return Rival(name, QWEN, repo, QWEN_LIGHT, (file,), FlowMatchEulerDiscreteScheduler, **how)


def _pipeline(name: str, base: str, repo: str, source: str, steps: int, guidance: float) -> Rival:
    return Rival(name, base, repo, source, steps=steps, guidance=guidance, kind="pipeline")


RIVALS = (
    Rival("lcm-lora", SD, "latent-consistency/lcm-lora-sdv1-5", f"{LCM}/lcm-lora-sdv1-5", (LORA,), LCMScheduler),
    Rival("lcm-lora", SDXL, "latent-consistency/lcm-lora-sdxl", f"{LCM}/lcm-lora-sdxl", (LORA,), LCMScheduler),
    _hyper("hyper-sd", SD, "Hyper-SD15-4steps-lora.safetensors", scheduler=DDIMScheduler, options=TRAILING),
    _hyper("hyper-sd", SDXL, "Hyper-SDXL-4steps-lora.safetensors", scheduler=DDIMScheduler, options=TRAILING),
    _hyper("hyper-sd-1", SD, "Hyper-SD15-1step-lora.safetensors", scheduler=TCDScheduler, steps=1, call={"eta": 1.0}),
    _hyper("hyper-sd-1", SDXL, "Hyper-SDXL-1step-lora.safetensors", scheduler=TCDScheduler, steps=1, call={"eta": 1.0}),
    _hyper(
        "hyper-sd-1-unet",
        SDXL,
        "Hyper-SDXL-1step-Unet.safetensors",
        "network",
        scheduler=LCMScheduler,
        steps=1,
        times=(800,),
    ),
    Rival("tcd", SD, "h1t/TCD-SD15-LoRA", TCD, (LORA,), TCDScheduler, call={"eta": 0.3}),
    Rival("tcd", SDXL, "h1t/TCD-SDXL-LoRA", TCD, (LORA,), TCDScheduler, call={"eta": 0.3}),
    Rival(
        "sdxl-lightning",
        SDXL,
        "ByteDance/SDXL-Lightning",
        LIGHT,
        ("sdxl_lightning_4step_unet.safetensors",),
        EulerDiscreteScheduler,
        TRAILING,
        kind="network",
        of="SDXL base 1.0",
    ),
    Rival(
        "sdxl-lightning-lora",
        SDXL,
        "ByteDance/SDXL-Lightning",
        LIGHT,
        ("sdxl_lightning_4step_lora.safetensors",),
        EulerDiscreteScheduler,
        TRAILING,
        of="fine-tunes of SDXL",
    ),
    Rival(
        "dmd2",
        SDXL,
        "tianweiy/DMD2",
        "https://github.com/tianweiy/DMD2",
        ("dmd2_sdxl_4step_lora_fp16.safetensors",),
        LCMScheduler,
        times=(999, 749, 499, 249),
    ),
    Rival(
        "sdxl-turbo",
        SDXL,
        "stabilityai/sdxl-turbo",
        "https://huggingface.co/docs/diffusers/using-diffusers/sdxl_turbo",
        (),
        EulerAncestralDiscreteScheduler,
        TRAILING,
        size=512,
        kind="pipeline",
        unchecked="the spacing of its times",
    ),
    Rival(
        "perflow",
        SD,
        "hansyan/perflow-sd15-delta-weights",
        "https://github.com/magic-research/piecewise-rectified-flow",
        steps=8,
        guidance=7.5,
        missing="its scheduler is in no diffusers release",
    ),
    Rival(
        "tdm",
        SD,
        "Luo-Yihong/TDM_dreamshaper_LoRA",
        TDM,
        ("tdm_dreamshaper.pt",),
        DPMSolverMultistepScheduler,
        guidance=1.0,
        of="DreamShaper 7",
        missing=PICKLE,
    ),
    Rival(
        "tdm",
        SD3,
        "Luo-Yihong/TDM_sd3_lora",
        TDM,
        (),
        DPMSolverMultistepScheduler,
        FLOW_6,
        guidance=1.0,
        strength=0.125,
        of="SD 3 medium",
        unchecked=NAME,
    ),
    Rival(
        "tdm-35",
        SD3,
        "Luo-Yihong/TDM_sd3-5_lora",
        TDM,
        ("tdm_sd3-5_lora.ckpt",),
        guidance=1.0,
        of="SD 3.5 medium",
        unchecked="its scheduler and strength",
        missing=PICKLE,
    ),
    Rival(
        "tdm",
        "CogVideoXPipeline",
        "Luo-Yihong/TDM_CogVideoX-2B_LoRA",
        TDM,
        guidance=1.0,
        of="CogVideoX-2b",
        unchecked=NAME,
    ),
    _qwen(
        "qwen-lightning",
        "lightx2v/Qwen-Image-Lightning",
        "Qwen-Image-Lightning-4steps-V2.0.safetensors",
        "Qwen-Image",
    ),
    _qwen(
        "qwen-lightning-2512",
        "lightx2v/Qwen-Image-2512-Lightning",
        "Qwen-Image-2512-Lightning-4steps-V1.0-bf16.safetensors",
        "Qwen-Image-2512",
    ),
    _pipeline(
        "klein",
        "Flux2KleinPipeline",
        "black-forest-labs/FLUX.2-klein-4B",
        "https://huggingface.co/black-forest-labs/FLUX.2-klein-4B",
        4,
        1.0,
    ),
    _pipeline(
        "z-image-turbo",
        "ZImagePipeline",
        "Tongyi-MAI/Z-Image-Turbo",
        "https://github.com/Tongyi-MAI/Z-Image",
        9,  # the last call, at time 0, changes nothing: its page counts 8
        0.0,
    ),
    _pipeline("krea-2-turbo", "Krea2Pipeline", "krea/Krea-2-Turbo", "https://github.com/krea-ai/krea-2", 8, 0.0),
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

    `folder` holds its files. A LoRA is fused into a copy of the base's network at the student's strength, a network's
    weights replace those of the copy, and the base stays as it is. Raises ValueError for files of another network.
    """
    if rival.kind == "pipeline":
        with reading(f"--against: {folder}", "fetch it again"):
            found = DiffusionPipeline.from_pretrained(folder, torch_dtype=base.dtype).to(base.device)
        if rival.scheduler is not None:
            found.scheduler = rival.scheduler.from_config(found.scheduler.config, **rival.options)
        found.set_progress_bar_config(disable=True)
        return found
    file = _file_of(rival, folder)
    kind = type(base.scheduler) if rival.scheduler is None else rival.scheduler
    scheduler = kind.from_config(base.scheduler.config, **rival.options)
    network = copy.deepcopy(denoiser_of(base))
    cure = f"it is of {rival.of}; choose another student" if rival.of else "choose a student of this base"
    with reading(f"--against {rival.name}: {file}", cure, "does not fit"):
        if rival.kind == "network":
            network.load_state_dict(read_tensors(file))
        pipe = with_network(base, network, scheduler, family_of_pipeline(base).pipeline)
        if rival.kind == "lora":
            pipe.load_lora_weights(str(folder), weight_name=file.name, adapter_name="rival", use_safetensors=True)
            pipe.fuse_lora(adapter_names=["rival"], lora_scale=rival.strength)
            pipe.unload_lora_weights()
    return pipe


def _file_of(rival: Rival, folder: Path) -> Path:
    """Return a student's file, named or the only one.

    Raises ValueError where the folder has several.
    """
    if rival.files:
        return folder / rival.files[0]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(
            f"--against {rival.name}: {folder} has {len(found)} safetensors files; leave the one of {rival.repo} there"
        )
    return found[0]


def draw_rival(
    pipe: DiffusionPipeline, rival: Rival, prompts: Sequence[str], seeds: Sequence[int], shape: Sequence[int], size: int
) -> Tensor:
    """Sample one image or video per prompt and seed.

    Returns images [B, 3, H, W] or videos [B, F, 3, H, W], from the noise that fewstep's students start from. `shape`
    is the shape of a state, and `size` the height and width of images. A whole pipeline may have latents of another
    shape, and makes its own noise from the seeds.
    """
    generators, family = [torch.Generator().manual_seed(s) for s in seeds], family_of_pipeline(pipe)
    options: dict[str, Any] = dict(rival.call) | dict(family.call_options(pipe))
    options |= {"timesteps": list(rival.times)} if rival.times else {"num_inference_steps": rival.steps}
    side = rival.size or size
    options |= {"height": side, "width": side} if side else {}
    if rival.kind != "pipeline":
        noise = family.latents(noise_of(generators, shape))
        options["latents"] = noise.to(device_of(denoiser_of(pipe)), pipe.dtype)
    found = pipe(
        prompt=list(prompts),
        guidance_scale=rival.guidance,
        generator=generators,
        output_type="pt",
        **options,
    )
    return found.frames if family.video else found.images
