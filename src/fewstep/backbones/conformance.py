"""Is a teacher what its files say, and does fewstep draw with it what diffusers draws? Looked at before a training rests on it.

Two families of checks: facts that are said (what it predicts, its schedule, its sizes, what is not read), and tests that hold or do not.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
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
from .generate import device_of, pictures
from .parts import PREDICTIONS, DiffusersBackbone, LatentUNet
from .schedulers import student_scheduler
from .trial import small_shape
from .unconditional import PixelModel, drawn_pixels, pixel_pipeline

CLOSE = {
    torch.float32: 1e-3,
    torch.float16: 0.1,
    torch.bfloat16: 0.5,
}  # of the pictures' own spread, by the type that networks calculate in
FLAT = 1 / 255  # a picture whose pixels differ by less is one colour
MOST = 2e13  # operations of a comparison on a CPU: a minute
BY_STEP = (
    "LCMScheduler",
    "TCDScheduler",
    "EulerAncestralDiscreteScheduler",
)  # of models that are often distilled already
PROMPT = "a photo of a red cat"
SAMPLING = {  # settings of schedulers that say how somebody samples, and what they are when they do nothing
    "clip_sample": False, "thresholding": False, "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "use_lu_lambdas": False, "stochastic_sampling": False, "variance_type": None, "shift_terminal": None,
}  # fmt: skip


def conformance(backbone: Backbone, prompt: str = PROMPT, steps: int = 2, guidance: float = 3.0) -> list[Check]:
    """Everything that can be said of a teacher in less than a minute; see `findings.require` for those that forbid a training.

    The few-step pictures are guided DDIM's, one of fewstep's and one of the pipeline's own call from the same noise. A U-Net on a CPU draws small ones.
    """
    checks = [*facts(backbone), *calls_are_finite(backbone, prompt)]
    return [*checks, *same_pictures(backbone, prompt, steps, guidance)] if all(c.holds for c in checks) else checks


def facts(backbone: Backbone) -> list[Check]:
    """What the teacher is, and what of its settings is not read."""
    module, schedule = backbone.module, backbone.schedule
    weights = sum(p.numel() for p in module.parameters())
    types = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()})
    family = type(backbone.pipe).__name__ if isinstance(backbone, DiffusersBackbone) else type(backbone).__name__
    end = torch.tensor([schedule.t_max], dtype=torch.float64)
    alpha, sigma = float(schedule.alpha(end)), float(schedule.sigma(end))
    left = float(share(schedule.alpha(end), schedule.sigma(end), backbone.row))
    terminal = "zero terminal SNR" if alpha / sigma < LEAST_SHARE else f"terminal SNR {(alpha / sigma) ** 2:.2g}"
    shown = f", pictures {backbone.image_size} x {backbone.image_size}" if backbone.image_size else ""
    found = [
        Check("model", f"{family}, {type(module).__name__} of {weights / 1e6:.1f} M weights in {' and '.join(types)}"),
        Check(
            "predicts",
            f"{prediction_of(backbone)}; an error of its output is {sigma / left:.3g} times as large in the clean estimate of the noisiest time",
        ),
        Check("schedule", f"{_schedule(schedule)}, {terminal}"),
        Check("states", f"{list(backbone.shape)}{shown}"),
    ]
    if isinstance(backbone, DiffusersBackbone):
        found += _of_pipeline(backbone.pipe)
    return found


def prediction_of(backbone: Backbone) -> str:
    """The name of its row: eps, v, x0, flow or edm."""
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


def _of_pipeline(pipe: DiffusionPipeline) -> list[Check]:
    called, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    distilled = (
        "may be distilled already: its scheduler is of the kind that few-step models have"
        if called in BY_STEP
        else "no sign that it is distilled already"
    )
    ignored = [k for k, off in SAMPLING.items() if k in config and config[k] != off and bool(config[k])]
    said = f"how its {called} samples ({', '.join(ignored)})" if ignored else "nothing"
    return [Check("distilled", f"{distilled} ({called})"), Check("not read", said)]


def calls_are_finite(backbone: Backbone, prompt: str = PROMPT) -> list[Check]:
    """One call of the network at its noisiest and its cleanest time, and one of the autoencoder each way."""
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
            found.append(_finite("encoder", finite(states), "what it makes of a picture", small))
    return found


def _finite(name: str, holds: bool, what: str, cure: str) -> Check:
    return Check(name, f"{what}: {'finite' if holds else 'not finite'}", holds, "" if holds else cure)


def same_pictures(backbone: Backbone, prompt: str, steps: int, guidance: float) -> list[Check]:
    """Guided few-step pictures of fewstep and of diffusers' own call from the same noise; largest relative difference in units of their spread."""
    if not isinstance(backbone, DiffusersBackbone):
        return []
    plain: Any = small(backbone)
    if isinstance(
        plain, PixelModel
    ):  # its pipeline takes no noise of ours, and what older torch draws in half precision is other noise
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
        ours = pictures(
            plain,
            guided(plain, plain.module, cond, null, Guidance(scale=scale)),
            [0],
            timegrid.uniform(plain.schedule, steps),
        )
        theirs = _of_diffusers(plain, prompts, steps, scale)
    limit, spread = CLOSE[_type(plain)], float(theirs.std())
    apart = float((ours.to(theirs) - theirs).square().mean().sqrt()) / max(spread, FLAT)
    kind = str(_type(plain)).removeprefix("torch.")
    same = apart <= limit  # not so where it is NaN
    said = f"pictures of {steps} steps at guidance {scale:g} differ by {apart:.1e} of the pictures' spread from diffusers' own (allowed in {kind}: {limit:g})"
    cure = "a setting of this model is not read: please report it with its configuration files"
    found = [Check("diffusers", said, same, "" if same else cure)]
    flat = not spread >= FLAT
    colour = (
        f"its pictures are one colour, {float(theirs.mean()):.2f} of white"
        if flat
        else f"pixels of its pictures spread by {spread:.2f} around {float(theirs.mean()):.2f}"
    )
    return [
        *found,
        Check("pictures", colour, not flat, "check its weights, its dtype and what it predicts" if flat else ""),
    ]


def _of_diffusers(backbone: Any, prompts: list[str], steps: int, scale: float) -> Tensor:
    scheduler = student_scheduler(backbone.scheduler_config, [steps], "ddim")
    if isinstance(backbone, PixelModel):
        pipe = pixel_pipeline(backbone.pipe.unet, scheduler, told=bool(backbone.labels))
        pipe.set_progress_bar_config(disable=True)
        return drawn_pixels(replace(backbone, pipe=pipe), prompts, steps).to(device_of(backbone.module))
    pipe = with_network(backbone.pipe, backbone.module, scheduler, type(backbone.pipe))
    size = backbone.image_size if isinstance(backbone, LatentUNet) else 0
    return drawn(pipe, prompts, steps, scale, size=size, shape=backbone.shape).to(device_of(backbone.module))


def small(backbone: Any) -> Any:
    """A U-Net on a CPU draws pictures as small as it can."""
    if isinstance(backbone, LatentUNet) and device_of(backbone.module).type == "cpu":
        unit = 2 ** len(backbone.pipe.unet.config.block_out_channels)
        return replace(backbone, size=min(backbone.shape[-1], 2 * unit))
    return backbone


def operations_of(backbone: Backbone, shape: Sequence[int]) -> float:
    """Of one call, about: two for every weight and place; places are patches of 2 x 2."""
    *frames, _, height, width = shape if len(shape) > 2 else (1, 1, *shape)
    return 2.0 * sum(p.numel() for p in backbone.module.parameters()) * math.prod(frames) * height * width / 4


def _type(backbone: Backbone) -> torch.dtype:
    found = next(p.dtype for p in backbone.module.parameters() if p.is_floating_point())
    return found if found in CLOSE else torch.float32


def _prompt(backbone: Backbone, prompt: str) -> str:
    """One that the model knows: its first class, where it has classes."""
    return backbone.labels[0] if isinstance(backbone, PixelModel) and backbone.labels else prompt
