"""A diffusers scheduler that steps through a student's own times.

For students that no stock scheduler can sample: heads, iPNDM, analytic first steps (AFS). And for students of flow
with fresh noise at every step, of which a call's generators are the source here alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..core.prediction import Row, Split, split
from ..core.schedule import Schedule, diffuse, expand
from ..core.solvers import Correction, Solver, SolverHistory, analytic_direction, step, with_analytic_first_step
from .flow_transformer import pack, unpack


@dataclass(frozen=True)
class SamplingSpec:
    """What a student is sampled with.

    `grids` has the student's times for every step count served.
    """

    schedule: Schedule
    row: Row
    solver: Solver
    grids: Mapping[int, Tensor]
    correct: Correction | None
    analytic_first_step: bool
    patch: int = 0  # side of the patches that the pipeline hands over as tokens; 0: states as they are


Generators = torch.Generator | Sequence[torch.Generator] | None  # as diffusers takes them


def noise_like(x: Tensor, patch: int, generator: Generators) -> Tensor:
    """Draw the noise that `generate.trajectory` draws from these generators, float32.

    x [B, C, h, w] with `patch` 0. Tokens [B, N, patch^2 C] are packed noise: of a square state where N is a square.
    """
    if not patch:
        return randn_tensor(x.shape, generator=generator, device=x.device)
    count, width = x.shape[1:]
    rows = math.isqrt(count) if math.isqrt(count) ** 2 == count else 1
    shape = (len(x), width // patch**2, rows * patch, count // rows * patch)
    return pack(randn_tensor(shape, generator=generator, device=x.device), patch)


def pipeline_nfe(schedule: Schedule, analytic: bool, steps: int) -> int:
    """Return a pipeline's NFE for one image.

    An analytic first step (AFS) saves one evaluation if the pipeline hands its scheduler the state on which
    it calls the network. Flow's pipelines do not.
    """
    return steps - int(analytic and steps > 1 and schedule.resolution > 0)


class StudentScheduler(DDIMScheduler):
    """A replacement for DDIM with the steps of `core.solvers.sample`.

    The numbers and the network evaluations are the same. Make one with `of`. The pipeline says where a step
    starts; the scheduler does not count steps, since image-to-image starts in the middle.
    """

    student: SamplingSpec
    skipped = 0  # analytic steps, of which the pipeline does not know
    history: SolverHistory | None = None
    generator: Generators = None  # of fresh noise, where the pipeline hands over none

    @staticmethod
    def of(config: Mapping[str, Any], student: SamplingSpec) -> "StudentScheduler":
        """Return a scheduler for a student, with a DDIM scheduler's `config`."""
        scheduler = StudentScheduler.from_config(dict(config))
        scheduler.student = student
        return scheduler

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the student's times for a step count.

        Of `sigmas`, which flow's pipelines pass, the number alone counts, and `mu` does not. Raises ValueError
        for a step count that the student does not serve.
        """
        if num_inference_steps is None:
            num_inference_steps = 0 if sigmas is None else len(sigmas)
        if num_inference_steps not in self.student.grids:
            raise ValueError(
                f"num_inference_steps: got {num_inference_steps}, this student serves "
                f"{', '.join(map(str, self.student.grids))}; supported step counts are these alone"
            )
        self.num_inference_steps = num_inference_steps
        self.grid = self.student.grids[num_inference_steps]
        # The times that a pipeline hands the network: indices of a table, or flow's times scaled to a table's.
        told = self.grid if self.student.schedule.resolution else self.grid * self.config.num_train_timesteps
        self.skipped = num_inference_steps - pipeline_nfe(
            self.student.schedule, self.student.analytic_first_step, num_inference_steps
        )
        self.timesteps = told[self.skipped : -1].to(
            device, torch.long if self.student.schedule.resolution else torch.float32
        )
        self.sigmas = (told / self.config.num_train_timesteps)[self.skipped :]
        self.history = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Do nothing: the pipeline says where a step starts."""

    def places(self, timestep: int | float | Tensor) -> Tensor:
        """Return the indices [N] of times in `timesteps`.

        Raises ValueError for a time at which the student has no step.
        """
        asked = torch.as_tensor(timestep, device=self.timesteps.device).reshape(-1)
        apart = (self.timesteps[None].double() - asked[:, None].double()).abs()
        if bool((apart.amin(1) > 0.25).any()):  # allows for rounding, never for another time of a table
            visits = ", ".join(f"{t:g}" for t in self.timesteps.tolist())
            raise ValueError(
                f"timestep: got {asked.tolist()}, this student visits {visits}; "
                "leave timesteps and sigmas to its scheduler"
            )
        return apart.argmin(1)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add noise to clean states at these times [B].

        Raises ValueError where no step is left, and for a student that starts from pure noise alone.
        """
        if not timesteps.numel():
            raise ValueError(
                f"strength: it leaves none of the {self.num_inference_steps} steps; "
                f"allowed are {1 / self.num_inference_steps:g} to 1"
            )
        if self.student.correct is not None or self.student.analytic_first_step:
            by = (
                "a head that knows where it began"
                if self.student.correct is not None
                else "a first direction that is taken from pure noise"
            )
            raise ValueError(f"image: this student has {by}; it samples from prompts alone, without an initial image")
        t = self.grid[self.skipped :][self.places(timesteps).cpu()].to(original_samples.device)
        return diffuse(self.student.schedule, original_samples, t, noise)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Add noise, under the name that flow's pipelines call."""
        return self.add_noise(sample, noise, timestep)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return the state on which the network is evaluated.

        At the first time after an analytic first step, the state that this step leads to. Otherwise `sample`.
        """
        first = self.skipped and timestep is not None and int(self.places(timestep)[0]) == 0
        return self._skip(sample.float())[0].to(sample.dtype) if first else sample

    def _state(self, x: Tensor) -> Tensor:
        """Return tokens as a square state, where a head looks at states."""
        if not self.student.patch or self.student.correct is None:
            return x
        side = math.isqrt(x.shape[1]) * self.student.patch
        return unpack(x, side, side, self.student.patch)

    def _skip(self, x: Tensor) -> tuple[Tensor, SolverHistory]:
        """Take the analytic first step from pure noise.

        Returns the next state and the history with this step.
        """
        s, history = self.student, SolverHistory(x / self.student.schedule.start_std)
        t, t_next = (v.to(x.device).expand(len(x)) for v in self.grid[:2])
        landed, done = step(s.solver, s.schedule, analytic_direction(s.schedule, x, t), t, t_next, history, s.correct)
        return landed, SolverHistory(history.noise, (done,))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take one step of the student from `timestep`.

        Only the first three arguments, `generator` and `return_dict` count.
        """
        s, x, place = self.student, self._state(sample.float()), int(self.places(timestep)[0]) + self.skipped
        m = self._state(model_output.float())
        if self.skipped and place == self.skipped:
            x, self.history = self._skip(x)
        t, t_next = (v.to(x.device).expand(len(x)) for v in self.grid[place : place + 2])

        def network(x: Tensor, t: Tensor) -> Split:
            return split(m, x, expand(s.schedule.alpha(t), x), expand(s.schedule.sigma(t), x), s.row)

        pred = (with_analytic_first_step(network, s.schedule) if s.analytic_first_step else network)(x, t)
        history = SolverHistory(x / s.schedule.start_std) if self.history is None else self.history
        patch, source = 0 if s.correct is not None else s.patch, self.generator if generator is None else generator
        solver = replace(s.solver, noise=lambda like: noise_like(like, patch, source))
        landed, done = step(solver, s.schedule, pred, t, t_next, history, s.correct)
        self.history = SolverHistory(history.noise, (done, *history.steps))
        landed = (pack(landed, s.patch) if landed.ndim > sample.ndim else landed).to(sample.dtype)
        return DDIMSchedulerOutput(landed, done.used.x0) if return_dict else (landed,)


class SeededFlowScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow's stochastic scheduler with noise from a call's generators.

    The stock scheduler takes its noise from torch's own generator: pipelines hand it no other. Its step is taken with
    known noise, in whose place this noise is put. Make one with `of`.
    """

    generator: Generators = None
    patch: int = 0

    @staticmethod
    def of(config: Mapping[str, Any], generator: Generators, patch: int) -> "SeededFlowScheduler":
        """Return a scheduler of this `config`.

        The pipeline hands over tokens of `patch`, or states for 0.
        """
        scheduler = SeededFlowScheduler.from_config(dict(config))
        scheduler.generator, scheduler.patch = generator, patch
        return scheduler

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        """Take one step. Returns what the stock scheduler returns."""
        first, again = (torch.Generator(sample.device).manual_seed(0) for _ in range(2))
        found = super().step(model_output, timestep, sample, *args, generator=first, **options)
        known = randn_tensor(sample.shape, generator=again, device=sample.device)
        change = self.sigmas[self.step_index].to(sample.device) * (
            noise_like(known, self.patch, self.generator) - known
        )
        landed = (found[0].float() + change).to(found[0].dtype)
        return type(found)(landed) if not isinstance(found, tuple) else (landed, *found[1:])
