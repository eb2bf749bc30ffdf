"""Scheduler configurations, students' times and layer names, for the tests of other programs."""

from dataclasses import replace
from typing import Any

from diffusers import DDIMScheduler

from fewstep.core.schedule import VP, Schedule
from fewstep.core.timegrid import uniform
from fewstep.student.card import StudentCard

from .card import CARD

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
EPS: dict[str, Any] = TABLE | {"prediction_type": "epsilon"}
V: dict[str, Any] = TABLE | {"prediction_type": "v_prediction"}
ZERO = V | {"rescale_betas_zero_snr": True}
BETAS = EPS | {"beta_schedule": "linear", "beta_end": 0.02}
UNREAD = (
    "conv_in",
    "conv_out",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
)  # by sd-scripts and stable-diffusion.cpp


def process(config: dict[str, Any]) -> VP:
    return VP(DDIMScheduler(**config).alphas_cumprod.double())


def on(schedule: Schedule, steps: int = 4, shift: float = 1.0, **own: Any) -> StudentCard:
    solver = own.pop("solver", "ddim")
    times = uniform(schedule, steps, shift).tolist()
    return replace(CARD, steps=(steps,), timesteps={str(steps): times}, solver={str(steps): solver}, **own)
