"""Diffusers pipelines with a student's defaults.

`pipe(prompt)` samples in the student's steps, without guidance, with no further arguments.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor, nn

from ..core.schedule import Flow
from .autoencoders import over_white
from .experts import Experts
from .families import FAMILIES, family_of_pipeline
from .family import ComfyParts, Family
from .files import loads_lora, part_name
from .generate import noise_of
from .parts import denoiser_of, embeds_guidance
from .sizes import Size, call_options
from .student_scheduler import SeededFlowScheduler, StudentScheduler

Kind = TypeVar("Kind", bound=DiffusionPipeline)


@dataclass(frozen=True)
class SamplingDefaults:
    """Default arguments of a student's pipeline.

    `steps` are the step counts served, the default one first.
    """

    steps: tuple[int, ...]
    size: Size = 0  # of the images or videos; 0: the base's
    scales: tuple[float, ...] = ()  # guidance scales that the student is conditioned on; empty: one is baked in
    told: float = 1.0  # guidance scale that the network is told, 1 for a network that is told none


class FewStepPipeline(DiffusionPipeline):
    """A mixin that changes a family's defaults to the student's."""

    defaults = SamplingDefaults((4,))
    set_condition: Callable[[int, float], None] = staticmethod(lambda steps, guidance: None)  # conditions the student

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        **options: Any,
    ) -> Any:
        """Call the family's pipeline with the student's defaults.

        `options` go to the family's own `__call__`. Warns for step counts and guidance scales that the
        student was not trained for. Raises ValueError for a step count below 1.
        """
        steps = self.defaults.steps[0] if num_inference_steps is None else num_inference_steps
        guidance = guidance_scale
        if steps < 1:
            raise ValueError(f"num_inference_steps: got {steps}, allowed are whole numbers from 1")
        if steps not in self.defaults.steps:
            warnings.warn(
                f"num_inference_steps: got {steps}, this student was trained for "
                f"{', '.join(map(str, self.defaults.steps))}",
                stacklevel=2,
            )
        if self.defaults.scales:
            guidance = self.defaults.scales[0] if guidance_scale == 1 else guidance_scale
            if guidance not in self.defaults.scales:
                known = ", ".join(f"{w:g}" for w in self.defaults.scales)
                warnings.warn(
                    f"guidance_scale: got {guidance}, this student was trained for {known}; the nearest is taken",
                    stacklevel=2,
                )
            guidance_scale = 1.0
        elif guidance_scale > 1:
            warnings.warn(
                f"guidance_scale: got {guidance_scale}, guidance is baked into this student; leave it at 1.0",
                stacklevel=2,
            )
        if isinstance(self.scheduler, StudentScheduler):
            self.scheduler.generator = options.get("generator")
        self.set_condition(steps, guidance)
        count = len(prompt) if isinstance(prompt, list) else 1
        if self.defaults.told != 1:
            guidance_scale = self.defaults.told
        options = {
            **family_of_pipeline(self).guidance(guidance_scale, count),
            **call_options(self.defaults.size),
            **options,
        }
        return super().__call__(prompt=prompt, num_inference_steps=steps, **options)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
    ) -> None:
        """Refuse to save the pipeline.

        Raises ValueError: a saved folder would hold neither the student's steps nor the student, and no
        library would load the folder.
        """
        raise ValueError(
            "save_pretrained: this pipeline is a base and a student; "
            f"run: fewstep export STUDENT {save_directory} --format pipeline"
        )


def _few_step(family: Family) -> type[FewStepPipeline]:
    """Return a family's pipeline class with a student's defaults.

    The class has the family's own name. diffusers finds related pipelines by this name
    (AutoPipelineForImage2Image.from_pipe).
    """
    return type(
        family.name,
        (FewStepPipeline, family.pipeline),
        {"__doc__": f"A {family.name} with a student's defaults.", "__module__": __name__},
    )


FEW_STEP: dict[str, type[FewStepPipeline]] = {
    name: _few_step(family) for name, family in FAMILIES.items() if family.takes_prompts
}


@dataclass(frozen=True)
class PipelineInfo:
    """How a pipeline is called.

    `part` is the name of the denoiser. `loads_lora` says whether the pipeline loads LoRA, `told_by` the
    argument with a student's own times (empty where the pipeline takes none), and `embeds_guidance` whether
    the network is told its guidance scale.
    """

    family: Family
    part: str
    loads_lora: bool
    told_by: str
    embeds_guidance: bool = False
    comfyui: ComfyParts | None = None
    boundary: float = 0.0  # between two networks, a share of the times; 0 for one network


def pipeline_info(pipe: DiffusionPipeline) -> PipelineInfo:
    """Return what a model card says of the base."""
    family, network = family_of_pipeline(pipe), denoiser_of(pipe)
    # DPM-Solver++ replaces a signal of 0 by 2^-12, which shows in the images.
    told_by = "" if pipe.scheduler.config.get("rescale_betas_zero_snr") else family.told_by
    boundary = network.boundary / pipe.scheduler.config.num_train_timesteps if isinstance(network, Experts) else 0.0
    comfyui, embeds = family.comfyui_parts(pipe), embeds_guidance(network)
    return PipelineInfo(family, part_name(network), loads_lora(network), told_by, embeds, comfyui, boundary)


def told_times(family: Family, shift: float, times: Sequence[float]) -> dict[str, list[float]]:
    """Return the option that tells a pipeline a student's own times.

    `times` are without clean data. Sigmas are fractions of the path, to which the student's scheduler
    applies its `shift`.
    """
    if family.told_by == "sigmas":
        fractions = Flow(shift=shift).fraction(torch.tensor(times, dtype=torch.float64))
        return {"sigmas": [round(u, 8) for u in fractions.tolist()]}
    return {"timesteps": [round(t) for t in times]}


def few_step_pipeline(
    base: DiffusionPipeline, network: nn.Module, scheduler: SchedulerMixin, defaults: SamplingDefaults
) -> FewStepPipeline:
    """Return the pipeline of `base` with a student's network and defaults.

    Raises ValueError for a pipeline without prompts.
    """
    family = family_of_pipeline(base)
    if not family.takes_prompts:
        raise ValueError(f"base: {type(base).__name__} takes no prompts; sample its students with fewstep.sample")
    kind = FEW_STEP[family.name]
    pipe = with_network(base, network, scheduler, kind)
    pipe.defaults = defaults
    return pipe


def with_network(base: DiffusionPipeline, network: nn.Module, scheduler: SchedulerMixin, kind: type[Kind]) -> Kind:
    """Return a pipeline of this `kind` from the parts of `base`.

    `network` and `scheduler` replace the denoiser and the scheduler.
    """
    settings = {k: v for k, v in base.config.items() if not k.startswith("_") and k not in base.components}
    pipe = kind(**{**settings, **base.components, part_name(network): network, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    steps: int,
    guidance: float = 1.0,
    times: Sequence[float] | None = None,
    size: Size = 0,
    shape: Sequence[int] = (),
    seed: int = 0,
) -> Tensor:
    """Sample one image per prompt.

    Seeds are `seed`, `seed + 1`, and so on. Returns images [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1]. The
    pipeline gets `times` where given, and a `size` other than 0. A pipeline without prompts samples as many images.
    With a `shape`, the initial noise is fewstep's: older torch samples other noise in half precision.
    """
    family = family_of_pipeline(pipe)
    if family.alone and len(prompts) > 1:
        each = [drawn(pipe, [p], steps, guidance, times, size, shape, seed + i) for i, p in enumerate(prompts)]
        return torch.cat(each)
    options: dict[str, Any] = {}
    if times is not None:
        options |= told_times(family, pipe.scheduler.config.get("shift", 1.0), times)
    if not isinstance(pipe, FewStepPipeline):
        options |= family.guidance(guidance, len(prompts))
    elif guidance != 1:
        options |= {"guidance_scale": guidance}
    options |= family.call_options(pipe)
    options |= call_options(size)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    if not family.takes_prompts:
        return pipe(batch_size=len(prompts), num_inference_steps=steps, generator=generators, output_type="pt").images
    if shape:
        options |= {"latents": family.latents(noise_of(generators, shape)).to(pipe.dtype)}
    own = pipe.scheduler
    if isinstance(own, FlowMatchEulerDiscreteScheduler) and own.config.stochastic_sampling:
        pipe.scheduler = SeededFlowScheduler.of(own.config, generators, family.patch)
    try:
        result = pipe(
            prompt=list(prompts),
            num_inference_steps=steps,
            generator=generators,
            output_type="pt",
            **options,
        )
    finally:
        pipe.scheduler = own
    return result.frames if family.video else over_white(result.images)
