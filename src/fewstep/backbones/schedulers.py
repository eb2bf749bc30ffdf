"""Stock schedulers that visit exactly the times that a student was trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, SchedulerMixin

from ..atomic import read_json

CONFIG = "scheduler_config.json"
_TABLE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "rescale_betas_zero_snr")
_TRAILING = {"timestep_spacing": "trailing", "steps_offset": 1}
_WHOLE = {"set_alpha_to_one": True, "clip_sample": False}


def student_scheduler(config: Mapping[str, Any], steps: Sequence[int], solver: str, even: bool = True) -> SchedulerMixin:
    """A stock scheduler that visits exactly the trained times for every step count served.

    On a table of times, DDIM on trailing times is exact where the step count divides the table; DPM-Solver++ of order 1 is the same
    rule and is exact for any. Stochastic students get diffusers' LCM scheduler. Video has a scheduler of its own, which alone knows
    its shift, and flow another; these two walk DDIM's way, which on flow is Euler's. ValueError where there is none. `config` is
    that of the teacher's scheduler. Times that are not `even` have to be told, which DPM-Solver++ takes and those two do not.
    """
    if not even and solver == "renoise":
        raise ValueError("method.shift: students that re-noise are exported for even times alone; set it to 1, or method.solver=ddim")
    if "snr_shift_scale" in config:
        _only("ddim", solver)
        if even:
            _divides(config, steps)
        shared = {k: config[k] for k in (*_TABLE, "snr_shift_scale") if k in config}
        return CogVideoXDDIMScheduler(**shared, **_WHOLE, timestep_spacing="trailing")
    if "shift" in config:
        _only("ddim", solver)
        return _flow()(num_train_timesteps=config["num_train_timesteps"], shift=config["shift"])
    shared = {k: config[k] for k in _TABLE if k in config}
    if solver == "renoise":
        _divides(config, steps)
        return LCMScheduler(**shared, original_inference_steps=config["num_train_timesteps"], clip_sample=False)
    if solver == "ddim" and even and all(config["num_train_timesteps"] % k == 0 for k in steps):
        return DDIMScheduler(**shared, **_WHOLE, **_TRAILING)
    return DPMSolverMultistepScheduler(**shared, **_TRAILING, solver_order=1 if solver == "ddim" else 2)


def load_scheduler(folder: Path) -> SchedulerMixin:
    """What `save_pretrained` of one of them wrote. Raises ValueError where it is missing or damaged."""
    path = folder / CONFIG
    try:
        name = read_json(path, "export the run again").get("_class_name")
    except FileNotFoundError as error:
        raise ValueError(f"student: {path} is missing; export the run again") from error
    known = {s.__name__: s for s in (DDIMScheduler, LCMScheduler, DPMSolverMultistepScheduler, CogVideoXDDIMScheduler)}
    if name not in known and name != "FlowMapEulerDiscreteScheduler":
        raise ValueError(f"student: {path} names {name}, which fewstep does not write; export the run again")
    return (known[name] if name in known else _flow()).from_pretrained(folder)


def _flow() -> type[SchedulerMixin]:
    """diffusers' only scheduler for flow whose K steps are the K even ones: its Euler scheduler ends on a step of no length."""
    try:
        from diffusers import FlowMapEulerDiscreteScheduler
    except ImportError as error:
        raise ValueError("student: few-step students of flow models need diffusers 0.42 or newer; run: pip install -U diffusers") from error
    return FlowMapEulerDiscreteScheduler


def _only(allowed: str, solver: str) -> None:
    if solver != allowed:
        raise ValueError(f"method.solver: got {solver}, students of this family are exported for {allowed} alone; choose that")


def _divides(config: Mapping[str, Any], steps: Sequence[int]) -> None:
    table = config["num_train_timesteps"]
    if any(table % k for k in steps):
        raise ValueError(
            f"method.steps: got {list(steps)}, students like this are exported for divisors of {table}; choose among 1, 2, 4, 5, 8"
        )
