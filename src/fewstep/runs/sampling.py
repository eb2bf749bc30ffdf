"""Samples of anything that samples: a teacher, a step of a training, a student."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backbones.base import Backbone, guided
from ..backbones.generate import require_seed, trajectory
from ..core import timegrid
from ..core.solvers import State
from ..export.card import StudentCard
from ..methods.method import student_of
from ..tensors import finite
from ..training.loop import Step
from ..trajp.head import Head, kind_of, require_steps
from .students import LoadedStudent


def require_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list. Raises ValueError for a single string, whose letters would be the prompts, and for none."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts: got the string {prompts!r}, allowed is a list of them; pass [{prompts!r}]")
    found = list(prompts)
    if not found:
        raise ValueError('prompts: got none; pass at least one, [""] for a network without conditions')
    if odd := [p for p in found if not isinstance(p, str)]:
        raise ValueError(f"prompts: got {odd[0]!r} among them, allowed are strings")
    return found


def sample(
    model: Backbone | LoadedStudent | Step,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    *,
    steps: int | None = None,
    guidance: float = 1.0,
    solver: str | None = None,
    told: int | None = None,
) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1], one per prompt (plain states for backbones without a picture).

    A step or a student takes its own steps, solver and no guidance, unless it was trained to be told its `guidance`; a teacher takes
    `steps` (default 50) and `guidance`.
    Seeds default to 0, 1, 2, ...; a seed gives the same picture in any batch. A student of several step counts is told the one
    it takes, or `told`.
    """
    states = sample_states(model, prompts, seeds, steps=steps, guidance=guidance, solver=solver, told=told)
    shown = backbone_of(model).decode(states[-1].x)
    if not finite(shown):
        raise FloatingPointError(
            f"sample: the pictures of {backbone_of(model).name} are not finite; load it in float32 or bfloat16, or run fewstep doctor TEACHER"
        )
    return shown


def sample_states(
    model: Backbone | LoadedStudent | Step,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    *,
    steps: int | None = None,
    guidance: float = 1.0,
    solver: str | None = None,
    told: int | None = None,
) -> list[State]:
    """As `sample`, but the whole trajectory: K + 1 states with the clean estimate that led to each."""
    prompts = require_prompts(prompts)
    if steps is not None and steps < 1:
        raise ValueError(f"steps: got {steps}, allowed are whole numbers from 1")
    if isinstance(seeds, int):
        raise ValueError(f"seeds: got {seeds}, allowed is a list of them; pass range({seeds}, {seeds + len(prompts)})")
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds: got {len(seeds)} for {len(prompts)} prompts; pass one seed a prompt")
    for seed in seeds:
        require_seed(seed, "seeds")
    backbone = backbone_of(model)
    with torch.no_grad():
        cond = backbone.encode(prompts)
        null = backbone.encode([""])
    scale = None if guidance == 1.0 else guidance
    if isinstance(model, Step):
        count = steps or model.method.counts[0]
        check_steps(model, count)
        times = model.method.times(backbone.schedule, count)
        with model.roles.averaged():
            denoise = student_of(model.method, model.roles, cond, told or count, scale)
            return trajectory(backbone, denoise, seeds, times, solver or model.method.solver, model.roles.head)
    if isinstance(model, LoadedStudent):
        count = steps or model.card.steps[0]
        check_steps(model, count)
        times = student_grid(model.card, backbone, count)
        own = model.card.solver.get(str(count), model.card.solver[str(model.card.steps[0])])
        return trajectory(
            backbone,
            model.student.denoise(cond, scale if model.card.scales else told or count),
            seeds,
            times,
            solver or own,
            model.student.head,
        )
    denoise = guided(backbone, backbone.module, cond, null, guidance)
    return trajectory(backbone, denoise, seeds, _grid(backbone, steps or 50), solver or "ddim")


def check_steps(model: LoadedStudent | Step, steps: int, option: str = "steps") -> None:
    """Raises ValueError where the student's head does not serve so many steps."""
    head = model.roles.head if isinstance(model, Step) else model.student.head
    if isinstance(head, Head):
        require_steps(kind_of(head), head.counts, steps, option, "take as many or fewer, or train a student for more (method.steps)")


def backbone_of(model: Backbone | LoadedStudent | Step) -> Backbone:
    """The backbone behind anything that samples."""
    if isinstance(model, Step):
        return model.roles.backbone
    return model.student.backbone if isinstance(model, LoadedStudent) else model


def _grid(backbone: Backbone, steps: int) -> Tensor:
    return timegrid.uniform(backbone.schedule, steps)


def student_grid(card: StudentCard, backbone: Backbone, steps: int) -> Tensor:
    """The trained times of this step count, or a uniform grid for a count that was not trained."""
    known = card.timesteps.get(str(steps))
    return _grid(backbone, steps) if known is None else timegrid.check(backbone.schedule, torch.tensor(known, dtype=torch.float64))
