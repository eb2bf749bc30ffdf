"""diffusers' schedulers: a model's process, and sampling of students.

A scheduler's settings give a model's process. For a student, a stock scheduler steps through exactly the
times that the student was trained on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
)

from ..core.schedule import EDM, VP, Schedule
from ..core.solvers import SOLVERS, Solver
from ..reading import read_json, reading
from .weights import UnfitError

EDM_SCHEDULERS = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)
# Sign of EDM's F in the output. In these schedulers, the names mean neither noise nor velocity.
EDM_SIGNS = {"epsilon": 1.0, "v_prediction": -1.0}
CONFIG = "scheduler_config.json"
# Among a backbone's scheduler settings: its pipeline tells the scheduler K even sigmas, and a shift that a student's
# scheduler does not read.
TOLD_SIGMAS = "_told_sigmas"
_TABLE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
_TRAILING = {"timestep_spacing": "trailing", "steps_offset": 1}
_WHOLE = {"set_alpha_to_one": True, "clip_sample": False}
_LEVELS = ("sigma_max", "sigma_data", "rho", "prediction_type", "num_train_timesteps")


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler's settings, with flow's under their usual names.

    Multistep solvers call flow's shift `flow_shift`, next to settings of a table of betas that they do not read.
    """
    if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
        return {"num_train_timesteps": config["num_train_timesteps"], "shift": config.get("flow_shift", 1.0)}
    return dict(config)


def process_of(scheduler: SchedulerMixin) -> Schedule:
    """Return the forward process that a scheduler undoes.

    A table of betas, or EDM's noise levels. Raises ValueError for a scheduler that has neither.
    """
    config = scheduler.config
    if not isinstance(scheduler, EDM_SCHEDULERS):
        if "beta_schedule" not in config:
            raise ValueError(
                f"its {type(scheduler).__name__} has no table of betas and is none of "
                f"{', '.join(s.__name__ for s in EDM_SCHEDULERS)}"
            )
        return table_of(scheduler)
    if config.prediction_type not in EDM_SIGNS:
        raise ValueError(
            f"its scheduler's prediction_type is {config.prediction_type}, allowed are {', '.join(EDM_SIGNS)}"
        )
    if config.sigma_schedule != "karras":
        raise ValueError(
            f"its scheduler's sigma_schedule is {config.sigma_schedule}; "
            f"set it to karras, which spaces steps otherwise, in {CONFIG}"
        )
    return noise_levels(config)


def table_of(scheduler: SchedulerMixin) -> VP:
    """Return the process of a scheduler's `alphas_cumprod`.

    Raises UnfitError where noise does not grow with time, and where the table does not have
    `num_train_timesteps` entries.
    """
    alphas, called = scheduler.alphas_cumprod.double(), type(scheduler).__name__
    if len(alphas) != scheduler.config.num_train_timesteps:
        raise UnfitError(
            f"its {called} has {len(alphas)} betas and says num_train_timesteps {scheduler.config.num_train_timesteps}"
        )
    if not bool(alphas.isfinite().all() and (alphas >= 0).all() and (alphas <= 1).all() and (alphas.diff() < 0).all()):
        raise UnfitError(f"its {called}'s betas are no noise schedule: signal does not fall from 1 towards 0 in it")
    return VP(alphas)


def noise_levels(config: Mapping[str, Any]) -> EDM:
    """Return the process of EDM's schedulers in diffusers.

    The initial state has the variance of unit-variance data under the largest noise.
    """
    return EDM(t_max=config["sigma_max"], t_min=config["sigma_min"], rho=config["rho"], data_std=1.0)


def student_scheduler(
    config: Mapping[str, Any], steps: Sequence[int], solver: str, even: bool = True
) -> SchedulerMixin:
    """Return a scheduler that steps through exactly the trained times.

    The scheduler serves every step count in `steps`. `config` is that of the teacher's scheduler. Times that
    are not `even` have to be given to the pipeline.

    On a table of times, DDIM on trailing times is exact if the step count divides the table. DPM-Solver++ of
    order 1 is the same rule and is exact for any step count. Students of a stochastic solver get LCM's
    scheduler, on flow Euler's with fresh noise. Students of a solver that no stock scheduler has get the stock
    scheduler of the nearest order, and fewstep's own when fewstep samples. CogVideoX has its own scheduler, which
    alone knows its shift; LCM's gets the shifted betas. Flow has another, whose Euler steps are DDIM's. On EDM's
    noise levels, the scheduler is right for the first of `steps` alone (see `_on_noise_levels`).

    Raises ValueError if there is no such scheduler.
    """
    rule = SOLVERS[solver]
    if "sigma_data" in config:
        return _on_noise_levels(config, steps[0], rule, even)
    flow = is_flow(config)
    if not even and rule.stochastic and not flow:
        raise ValueError(
            "method.shift: students of a stochastic solver can only be exported with uniform time grids; "
            "set it to 1, or method.solver=ddim"
        )
    if "snr_shift_scale" in config:
        if even:
            _divides(config, steps)
        shared = {k: config[k] for k in (*_TABLE, "snr_shift_scale") if k in config}
        own = CogVideoXDDIMScheduler(**shared, **_WHOLE, timestep_spacing="trailing")
        if rule.stock == "lcm":
            table = {k: config[k] for k in ("num_train_timesteps", "prediction_type")}
            return _lcm({**table, "trained_betas": _betas(own.alphas_cumprod)})
        _only_ddim(rule)
        return own
    if flow:
        table, shift = config["num_train_timesteps"], config.get("shift", 1.0)
        if rule.stock == "lcm":
            return FlowMatchEulerDiscreteScheduler(table, shift=shift, stochastic_sampling=True)
        _only_ddim(rule)
        if config.get(TOLD_SIGMAS):
            return FlowMatchEulerDiscreteScheduler(table, shift=shift)
        return _flow()(num_train_timesteps=table, shift=shift)
    shared = {k: config[k] for k in _TABLE if k in config}
    if rule.stock == "lcm":
        _divides(config, steps)
        return _lcm(shared)
    if rule.order == 1 and even and all(config["num_train_timesteps"] % k == 0 for k in steps):
        return DDIMScheduler(**shared, **_WHOLE, **_TRAILING)
    return DPMSolverMultistepScheduler(**shared, **_TRAILING, solver_order=min(rule.order, 2))


def is_flow(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler's settings are those of flow.

    With neither a table of betas nor EDM's noise levels.
    """
    return "beta_schedule" not in config and "sigma_data" not in config


def visits_alone(config: Mapping[str, Any], solver: str, even: bool) -> bool:
    """Return whether a pipeline told a step count visits a student's times.

    Euler's scheduler of flow, which a stochastic student of flow has, visits others by itself: its pipeline has to
    tell it K even sigmas. `config` is that of the backbone, and `even` says that the times are.
    """
    return even and (not (SOLVERS[solver].stochastic and is_flow(config)) or bool(config.get(TOLD_SIGMAS)))


def _lcm(table: Mapping[str, Any]) -> SchedulerMixin:
    """Return LCM's scheduler on a table of betas, with trailing times."""
    return LCMScheduler(**table, original_inference_steps=table["num_train_timesteps"], clip_sample=False)


def _betas(alphas: torch.Tensor) -> list[float]:
    """Return the betas of a table of `alphas_cumprod`.

    The last of the table may be 0.
    """
    exact = alphas.double()
    betas: list[float] = (1 - exact / torch.cat([exact.new_ones(1), exact[:-1]])).tolist()
    return betas


def _on_noise_levels(config: Mapping[str, Any], steps: int, rule: Solver, even: bool) -> SchedulerMixin:
    """Return EDM's Euler or DPM-Solver++ scheduler for one step count.

    Euler is DDIM on noise levels. The last noise level is that of the student's last step. diffusers spaces K
    levels evenly in the rho-th root from `sigma_max` to `sigma_min` and goes to clean data from there.
    fewstep spaces K steps evenly from `sigma_max` to clean data; its last level is the scheduler's
    `sigma_min` for these K.
    """
    if not even:
        raise ValueError("method.shift: students on EDM's noise levels are exported for even times alone; set it to 1")
    if rule.stochastic:
        raise ValueError(
            f"method.solver: got {rule.name}, students on EDM's noise levels are exported for ddim or dpmpp; choose one"
        )
    last = float(noise_levels(config).at(torch.tensor(1 / steps, dtype=torch.float64)))
    shared = {**{k: config[k] for k in _LEVELS if k in config}, "sigma_min": last}
    multistep = rule.order > 1 and rule.stock
    return EDMDPMSolverMultistepScheduler(**shared) if multistep else EDMEulerScheduler(**shared)


def load_scheduler(folder: Path) -> SchedulerMixin:
    """Load a student's scheduler that `save_pretrained` wrote.

    Raises ValueError where the file is missing or damaged, and for a scheduler that fewstep does not write.
    """
    path = folder / CONFIG
    try:
        name = read_json(path, "export the run again").get("_class_name")
    except FileNotFoundError as error:
        raise ValueError(f"student: {path} is missing; export the run again") from error
    kinds = (
        DDIMScheduler,
        LCMScheduler,
        DPMSolverMultistepScheduler,
        CogVideoXDDIMScheduler,
        FlowMatchEulerDiscreteScheduler,
        *EDM_SCHEDULERS,
    )
    known: dict[str, Any] = {s.__name__: s for s in kinds}
    if not isinstance(name, str) or (name not in known and name != "FlowMapEulerDiscreteScheduler"):
        raise ValueError(f"student: {path} names {name!r}, which fewstep does not write; export the run again")
    kind = known[name] if name in known else _flow()
    with reading(f"student: {path}", "export the run again"):
        found: SchedulerMixin = kind.from_pretrained(folder)
    return found


def _flow() -> type[SchedulerMixin]:
    """Return diffusers' flow scheduler with K even steps.

    diffusers' Euler scheduler for flow ends on a step of length 0. Raises ValueError for diffusers before
    0.42.
    """
    try:
        from diffusers import FlowMapEulerDiscreteScheduler
    except ImportError as error:
        raise ValueError(
            "student: few-step students of flow models need diffusers 0.42 or newer; run: pip install -U diffusers"
        ) from error
    return FlowMapEulerDiscreteScheduler


def _only_ddim(rule: Solver) -> None:
    if rule.name != "ddim":
        raise ValueError(
            f"method.solver: got {rule.name}, students of this family are exported for ddim or renoise; choose one"
        )


def _divides(config: Mapping[str, Any], steps: Sequence[int]) -> None:
    table = config["num_train_timesteps"]
    if any(table % k for k in steps):
        raise ValueError(
            f"method.steps: got {list(steps)}, students like this are exported for divisors of {table}; "
            "choose among 1, 2, 4, 5, 8"
        )
