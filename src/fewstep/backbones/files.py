"""A student as files that diffusers loads, and the pipeline that is right without a word from its user."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..atomic import write_tensors
from .student_scheduler import StudentScheduler, Walking

LORA_FILE = "pytorch_lora_weights.safetensors"
CONDITION_FILE = "step_condition.safetensors"  # beside a student of several step counts: what tells it the one it takes


@dataclass(frozen=True)
class Serving:
    """How a student wants to be called: step counts served, the first one the default; guidance is baked in."""

    steps: tuple[int, ...]


def student_scheduler(config: Mapping[str, Any], steps: Sequence[int], solver: str) -> SchedulerMixin:
    """A stock scheduler that visits exactly the trained times for every step count served.

    DDIM on trailing times is exact where the step count divides the table; DPM-Solver++ of order 1 is the same rule and is
    exact for any. Stochastic students get diffusers' LCM scheduler, whose times are exact where the step count divides the table:
    ValueError otherwise. `config` is that of the teacher's scheduler.
    """
    shared = {k: v for k, v in config.items() if k in _SHARED}
    divides = all(config["num_train_timesteps"] % k == 0 for k in steps)
    if solver == "renoise":
        if not divides:
            raise ValueError(
                f"method.steps: got {list(steps)}, students sampled with renoise are exported for divisors of {config['num_train_timesteps']}; choose among 1, 2, 4, 5, 8"
            )
        return LCMScheduler(**shared, original_inference_steps=config["num_train_timesteps"], clip_sample=False)
    if solver == "ddim" and divides:
        return DDIMScheduler(**shared, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, steps_offset=1)
    return DPMSolverMultistepScheduler(**shared, timestep_spacing="trailing", solver_order=1 if solver == "ddim" else 2, steps_offset=1)


_SHARED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "rescale_betas_zero_snr")


def save_lora(folder: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """`folder/pytorch_lora_weights.safetensors` in diffusers' format, with the adapter's settings in its header."""
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=dict(state), unet_lora_adapter_metadata=plain)
    return folder / LORA_FILE


def save_network(folder: Path, module: nn.Module) -> None:
    """A full student: the whole network in diffusers' format."""
    module.save_pretrained(folder)  # type: ignore[operator]


class FewStepPipeline(StableDiffusionPipeline):
    """A Stable Diffusion pipeline whose defaults are the student's: `pipe(prompt)` takes its steps, without guidance."""

    serving = Serving((4,))
    tell: Callable[[int], None] = staticmethod(lambda steps: None)  # tells a student of several step counts the one it takes

    def __call__(
        self, prompt: str | list[str] | None = None, num_inference_steps: int | None = None, guidance_scale: float = 1.0, **options: Any
    ) -> Any:
        """As `StableDiffusionPipeline.__call__`, to which `options` go; warns when asked for other steps or for guidance."""
        steps = num_inference_steps or self.serving.steps[0]
        if steps not in self.serving.steps:
            warnings.warn(
                f"num_inference_steps: got {steps}, this student was trained for {', '.join(map(str, self.serving.steps))}", stacklevel=2
            )
        if guidance_scale > 1:
            warnings.warn(f"guidance_scale: got {guidance_scale}, guidance is baked into this student; leave it at 1.0", stacklevel=2)
        self.tell(steps)
        return super().__call__(prompt, num_inference_steps=steps, guidance_scale=guidance_scale, **options)


def few_step_pipeline(
    base: DiffusionPipeline, student: Path, serving: Serving, weights: str, walking: Walking | None = None, adapter: str = "fewstep"
) -> FewStepPipeline:
    """`base` with the student in `student/` on it: LoRA at strength 1.0 or whole network (`weights` lora, full, none), its scheduler, its steps.

    `walking` takes the place of the scheduler in its folder.
    """
    # Modules of its own around the same weights: the LoRA goes on this pipeline, and whoever holds `base` keeps the teacher.
    shared: dict[int, Any] = {id(t): t for t in (*base.unet.parameters(), *base.unet.buffers())}
    pipe = FewStepPipeline(**{**base.components, "unet": copy.deepcopy(base.unet, shared)}, requires_safety_checker=False)
    pipe.serving = serving
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = _scheduler(student) if walking is None else StudentScheduler.walking(base.scheduler.config, walking)
    if weights == "full":
        pipe.unet = type(pipe.unet).from_pretrained(student / "unet").to(pipe.unet.device, pipe.unet.dtype)
    elif weights == "lora":
        pipe.load_lora_weights(str(student), adapter_name=adapter)
        pipe.enable_lora()  # a base that has just been trained on has its adapters switched off
    return pipe


def _scheduler(student: Path) -> SchedulerMixin:
    index = (student / "scheduler" / "scheduler_config.json").read_text()
    scheduler = next(s for s in (DDIMScheduler, LCMScheduler, DPMSolverMultistepScheduler) if f'"{s.__name__}"' in index)
    return scheduler.from_pretrained(student / "scheduler")


def load_lora(folder: Path) -> dict[str, Tensor]:
    """The LoRA of a student folder in PEFT's file format (layer names without the `unet.` prefix).

    Raises ValueError when the file is missing or damaged.
    """
    path = folder / LORA_FILE
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"student: {path} is missing or damaged ({str(error).splitlines()[0]}); export the run again") from error
    return {k.removeprefix("unet."): v for k, v in state.items()}


def save_vectors(folder: Path, vectors: Mapping[int, Tensor]) -> None:
    """One vector per step count."""
    write_tensors(folder / CONDITION_FILE, {str(k): v.float() for k, v in vectors.items()})


def load_vectors(folder: Path) -> dict[int, Tensor]:
    """Inverse of `save_vectors`. Raises ValueError when the file is missing or damaged."""
    try:
        return {int(k): v for k, v in load_file(folder / CONDITION_FILE).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"student: {folder / CONDITION_FILE} is missing or damaged ({str(error).splitlines()[0]}); export the run again"
        ) from error


def load_network(folder: Path, like: nn.Module) -> nn.Module:
    """The whole network of a full student, of the class of `like`. Raises ValueError when it is missing or damaged."""
    try:
        network = type(like).from_pretrained(folder / "unet")  # type: ignore[attr-defined]
        return network.to(next(like.parameters()).device).requires_grad_(False).eval()
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"student: {folder / 'unet'} is missing or damaged ({str(error).splitlines()[0]}); export the run again"
        ) from error
