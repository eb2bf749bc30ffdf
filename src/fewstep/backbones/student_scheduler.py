"""A scheduler that walks a diffusers pipeline down a student's own steps where no stock scheduler can: heads, iPNDM, free first steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from ..core.prediction import Row, Split, split
from ..core.schedule import Schedule, expand
from ..core.solvers import Correct, Past, Solver, free_first, step


@dataclass(frozen=True)
class Walking:
    """What a student is sampled with. `grids`: its times for every step count served."""

    schedule: Schedule
    row: Row
    solver: Solver
    grids: Mapping[int, Tensor]
    correct: Correct | None
    free: bool


class StudentScheduler(DDIMScheduler):
    """In the place of DDIM, with the numbers of `core.solvers.sample`. Make one with `walking`.

    A pipeline asks the network at every step: a free first step is right here, and not free.
    """

    student: Walking
    visited = 0
    past: Past | None = None

    @staticmethod
    def walking(config: Mapping[str, Any], student: Walking) -> "StudentScheduler":
        scheduler = StudentScheduler.from_config(dict(config))
        scheduler.student = student
        return scheduler

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Raises ValueError for a step count that the student does not serve."""
        if num_inference_steps not in self.student.grids:
            raise ValueError(
                f"num_inference_steps: got {num_inference_steps}, this student serves {', '.join(map(str, self.student.grids))}; its steps cannot be made up"
            )
        self.num_inference_steps = num_inference_steps
        self.grid = self.student.grids[num_inference_steps]
        # A pipeline hands the network these: indices of a table, or flow's times as parts of one.
        told = self.grid if self.student.schedule.resolution else self.grid * self.config.num_train_timesteps
        self.timesteps = told[:-1].to(device, torch.long if self.student.schedule.resolution else torch.float32)
        self.visited, self.past = 0, None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step of the student; only the first three arguments count."""
        s, x = self.student, sample.float()
        t, t_next = (v.to(x.device).expand(len(x)) for v in self.grid[self.visited : self.visited + 2])

        def network(x: Tensor, t: Tensor) -> Split:
            return split(model_output.float(), x, expand(s.schedule.alpha(t), x), expand(s.schedule.sigma(t), x), s.row)

        here = (free_first(network, s.schedule) if s.free else network)(x, t)
        past = Past(x / s.schedule.start_std) if self.past is None else self.past
        landed, visit = step(s.solver, s.schedule, here, t, t_next, past, s.correct)
        self.past, self.visited = Past(past.noise, (visit, *past.visits)), self.visited + 1
        landed = landed.to(sample.dtype)
        return DDIMSchedulerOutput(landed, visit.way.x0) if return_dict else (landed,)
