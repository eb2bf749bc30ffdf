"""Checks of a teacher before a training rests on it.

Facts say what the teacher is: what it predicts, its schedule, its sizes, and which settings fewstep does
not read. Tests hold or fail: network outputs are finite, and fewstep's images are those of diffusers.
"""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..core import timegrid
from ..core.guidance import Guidance
from ..core.prediction import ROWS, share
from ..core.schedule import EDM, VP, Flow
from ..findings import Check
from ..tensors import finite
from .base import LEAST_SHARE, Backbone, Denoiser, guided
from .few_step import drawn, with_network
from .generate import device_of, sample_images
from .half_on_cpu import half_types, slow_half
from .parts import PREDICTIONS, DiffusersBackbone, Sized, denoiser_of
from .schedulers import student_scheduler
from .trial import small_shape
from .unconditional import PixelModel, drawn_pixels, pixel_pipeline

# Largest difference from diffusers' images, in units of their standard deviation, by the networks' dtype.
CLOSE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
FLAT = 1 / 255  # an image whose pixels have a smaller standard deviation is one colour
MOST = 2e13  # operations on a CPU in about a minute
# Schedulers of models that are often distilled already.
BY_STEP = ("LCMScheduler", "TCDScheduler", "EulerAncestralDiscreteScheduler")
# Words in the names of models that few steps or no guidance were trained into.
TURBO = re.compile(
    r"(?<![a-z0-9])(turbo|lightning|hyper|lcm|tcd|pcm|schnell|flash|dmd2?|tdm|twinflow|causvid|accvideo|fastwan|"
    r"(?:step|cfg|guidance)?distill(?:ed)?|few[-_ ]?steps?|[1-8][-_ ]?steps?)(?![a-z0-9])"
)
PROMPT = "a photo of a red cat"
# Schedulers' settings that change how somebody samples and not the model, with the values that do nothing.
SAMPLING = {
    "clip_sample": False, "thresholding": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "use_lu_lambdas": False, "stochastic_sampling": False, "variance_type": None,
    "shift_terminal": None,
}  # fmt: skip


def conformance(backbone: Backbone, prompt: str = PROMPT, steps: int = 2, guidance: float = 3.0) -> list[Check]:
    """Return all checks of a teacher, in less than a minute.

    `findings.require` refuses a training for a check that does not hold. Images are compared only if all
    other checks hold. The images are those of guided DDIM in `steps` steps, by fewstep and by the
    pipeline's own call from the same noise. A U-Net on a CPU samples small images.
    """
    checks = [*facts(backbone), *calls_are_finite(backbone, prompt)]
    return [*checks, *same_images(backbone, prompt, steps, guidance)] if all(c.holds for c in checks) else checks


def facts(backbone: Backbone) -> list[Check]:
    """Return what the teacher is, and which settings are not read."""
    module, schedule = backbone.module, backbone.schedule
    weights = sum(p.numel() for p in module.parameters())
    types = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()})
    family = type(backbone.pipe).__name__ if isinstance(backbone, DiffusersBackbone) else type(backbone).__name__
    end = torch.tensor([schedule.t_max], dtype=torch.float64)
    alpha, sigma = float(schedule.alpha(end)), float(schedule.sigma(end))
    left = float(share(schedule.alpha(end), schedule.sigma(end), backbone.row))
    terminal = "zero terminal SNR" if alpha / sigma < LEAST_SHARE else f"terminal SNR {(alpha / sigma) ** 2:.2g}"
    shown = f", images {backbone.image_size} x {backbone.image_size}" if backbone.image_size else ""
    found = [
        Check("model", f"{family}, {type(module).__name__} of {weights / 1e6:.1f} M weights in {' and '.join(types)}"),
        Check(
            "predicts",
            f"{prediction_of(backbone)}; an error of its output is {sigma / left:.3g} times as large in the "
            "clean estimate of the noisiest time",
        ),
        Check("schedule", f"{_schedule(schedule)}, {terminal}"),
        Check("states", f"{list(backbone.shape)}{shown}"),
    ]
    if device_of(module).type == "cpu":
        slow = (slow_half(dtype, "set dtype to float32") for dtype in half_types(module))
        found += [Check("speed", said) for said in slow if said]
    if isinstance(backbone, DiffusersBackbone):
        found += _of_pipeline(backbone.pipe, backbone.source or backbone.name)
    return found


def prediction_of(backbone: Backbone) -> str:
    """Name a backbone's prediction: eps, v, x0, flow or edm."""
    if isinstance(backbone, Denoiser):
        return backbone.prediction
    config = backbone.scheduler_config
    if "sigma_data" in config:
        return "edm"
    return (
        next(n for n, row in ROWS.items() if row is backbone.row)
        if "prediction_type" not in config
        else PREDICTIONS[config["prediction_type"]]
    )


def _schedule(schedule: object) -> str:
    if isinstance(schedule, VP):
        return f"a table of {len(schedule.alpha_bar)} times"
    if isinstance(schedule, Flow):
        return f"flow, shift {schedule.shift:g}"
    if isinstance(schedule, EDM):
        return f"EDM's noise levels from {schedule.t_min:g} to {schedule.t_max:g}"
    return type(schedule).__name__


def distilled_already(pipe: DiffusionPipeline, name: str) -> str:
    """Say by which signs a teacher is itself a student.

    A student of few steps or of guidance; empty without a sign.
    `name` is what the user calls the teacher. A base that takes guidance as an input is a student of guidance.
    """
    called = type(pipe.scheduler).__name__
    signs = [f"its scheduler is of the kind that few-step models have, {called}"] * (called in BY_STEP)
    config: Any = denoiser_of(pipe).config
    if config.get("guidance_embeds") or config.get("time_cond_proj_dim"):
        signs.append("its network takes the guidance scale as an input")
    if pipe.config.get("is_distilled"):
        signs.append("its model_index.json says is_distilled")
    told = {word for text in (name, str(pipe.name_or_path)) for word in TURBO.findall(Path(text).name.lower())}
    signs += [f"its name says {word}" for word in sorted(told)]
    return (
        f"may be distilled already: {' and '.join(signs)}; a student learns what it draws, at its guidance and in its "
        "steps: the base that it was made from is the better teacher"
        if signs
        else ""
    )


def _of_pipeline(pipe: DiffusionPipeline, name: str) -> list[Check]:
    called, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    distilled = distilled_already(pipe, name) or "no sign that it is distilled already"
    ignored = [k for k, off in SAMPLING.items() if k in config and config[k] != off and bool(config[k])]
    said = f"how its {called} samples ({', '.join(ignored)})" if ignored else "nothing"
    return [Check("distilled", distilled), Check("not read", said)]


def calls_are_finite(backbone: Backbone, prompt: str = PROMPT) -> list[Check]:
    """Check that a teacher's networks return finite numbers.

    One call of the text encoders, one of the denoiser at the noisiest and one at the cleanest time, and one
    call of the autoencoder each way. Skipped on a CPU where a call takes too long (`MOST`).
    """
    device, schedule = device_of(backbone.module), backbone.schedule
    shape = backbone.shape if device.type != "cpu" else small_shape(backbone)
    if device.type == "cpu" and (cost := operations_of(backbone, shape)) > MOST:
        return [Check("calls", f"not looked at: on a CPU one takes about {cost / MOST:.0f} minutes")]
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    small = (
        "set dtype to bfloat16 or float32, or check its weights"
        if _type(backbone) == torch.float16
        else "check its weights and its configuration"
    )
    first = (
        schedule.resolution - 1 if schedule.resolution else float(schedule.at(torch.tensor(1e-3, dtype=torch.float64)))
    )
    found = []
    with torch.no_grad():
        cond = backbone.encode([_prompt(backbone, prompt)])
        found.append(_finite("text", all(finite(v) for v in cond.values()), "its conditions", small))
        for name, time in (("noisiest time", schedule.t_max), ("cleanest time", first)):
            t = torch.full((1,), time, dtype=torch.float64, device=device)
            x = noise * float(schedule.sigma(t).cpu()) if time != schedule.t_max else noise * schedule.start_std
            m = backbone.predict(backbone.module, x, t, cond)
            found.append(_finite(name, finite(m), f"what the network says at {time:g}", small))
        drawn_there = backbone.decode(noise)
        found.append(_finite("decoder", finite(drawn_there), "what it makes of noise", small))
        if backbone.image_size:
            side = drawn_there.shape[-1]
            states = backbone.encode_images(
                torch.rand(1, drawn_there.shape[-3], side, side, generator=torch.Generator().manual_seed(1)).to(device)
            )
            found.append(_finite("encoder", finite(states), "what it makes of an image", small))
    return found


def _finite(name: str, holds: bool, what: str, cure: str) -> Check:
    return Check(name, f"{what}: {'finite' if holds else 'not finite'}", holds, "" if holds else cure)


def same_images(backbone: Backbone, prompt: str, steps: int, guidance: float) -> list[Check]:
    """Compare few-step images with those of diffusers' own pipeline.

    Both are sampled with guidance from the same noise. The difference is a root mean square, in units of
    the standard deviation of diffusers' images. A second check is that these images are not one colour.
    Empty for a backbone without a diffusers pipeline; skipped on a CPU where the images take too long
    (`MOST`).
    """
    if not isinstance(backbone, DiffusersBackbone):
        return []
    plain: Any = small(backbone)
    if isinstance(plain, PixelModel):
        # A pixel model's pipeline takes no initial noise, and older torch samples other noise in half precision.
        plain = replace(
            plain,
            pipe=pixel_pipeline(copy.deepcopy(plain.module).float(), plain.pipe.scheduler, told=bool(plain.labels)),
        )
    if device_of(backbone.module).type == "cpu" and (cost := 4 * steps * operations_of(plain, plain.shape)) > MOST:
        return [Check("diffusers", f"not compared: on a CPU that takes about {cost / MOST:.0f} minutes")]
    prompts = [_prompt(backbone, prompt)]
    with torch.no_grad():
        cond, null = plain.encode(prompts), plain.encode([""])
        scale = guidance if cond and not isinstance(plain, PixelModel) else 1.0
        ours = sample_images(
            plain,
            guided(plain, plain.module, cond, null, Guidance(scale=scale)),
            [0],
            timegrid.uniform(plain.schedule, steps),
        )
        theirs = _of_diffusers(plain, prompts, steps, scale)
    limit, spread = CLOSE[_type(plain)], float(theirs.std())
    apart = float((ours.to(theirs) - theirs).square().mean().sqrt()) / max(spread, FLAT)
    kind = str(_type(plain)).removeprefix("torch.")
    same = apart <= limit  # False for NaN
    said = (
        f"images of {steps} steps at guidance {scale:g} differ by {apart:.1e} of the images' spread "
        f"from diffusers' own (allowed in {kind}: {limit:g})"
    )
    cure = "a setting of this model is not read: please report it with its configuration files"
    found = [Check("diffusers", said, same, "" if same else cure)]
    flat = not spread >= FLAT
    colour = (
        f"its images are one colour, {float(theirs.mean()):.2f} of white"
        if flat
        else f"pixels of its images spread by {spread:.2f} around {float(theirs.mean()):.2f}"
    )
    return [
        *found,
        Check("images", colour, not flat, "check its weights, its dtype and what it predicts" if flat else ""),
    ]


def _of_diffusers(backbone: Any, prompts: list[str], steps: int, scale: float) -> Tensor:
    scheduler = student_scheduler(backbone.scheduler_config, [steps], "ddim")
    if isinstance(backbone, PixelModel):
        pipe = pixel_pipeline(backbone.pipe.unet, scheduler, told=bool(backbone.labels))
        pipe.set_progress_bar_config(disable=True)
        return drawn_pixels(replace(backbone, pipe=pipe), prompts, steps).to(device_of(backbone.module))
    pipe = with_network(backbone.pipe, backbone.module, scheduler, type(backbone.pipe))
    theirs = drawn(pipe, prompts, steps, scale, size=backbone.own_size, shape=backbone.shape)
    return theirs.to(device_of(backbone.module))


def small(backbone: Any) -> Any:
    """Shrink the images of a backbone of any size on a CPU.

    States are then at most as wide as `small` says. Other backbones come back unchanged.
    """
    if isinstance(backbone, Sized) and device_of(backbone.module).type == "cpu":
        return backbone.at(min(backbone.shape[-1], backbone.small))
    return backbone


def operations_of(backbone: Backbone, shape: Sequence[int]) -> float:
    """Estimate the operations of one network call.

    Two for every weight and position. A position is a patch of 2 x 2.
    """
    config = getattr(backbone.module, "config", {})
    channels = config.get("in_channels", shape[-3] if len(shape) > 2 else 1)
    return 2.0 * sum(p.numel() for p in backbone.module.parameters()) * math.prod(shape) / channels / 4


def _type(backbone: Backbone) -> torch.dtype:
    found = next(p.dtype for p in backbone.module.parameters() if p.is_floating_point())
    return found if found in CLOSE else torch.float32


def _prompt(backbone: Backbone, prompt: str) -> str:
    """Return a prompt that the model knows.

    A model with classes gets its first class.
    """
    return backbone.labels[0] if isinstance(backbone, PixelModel) and backbone.labels else prompt
