"""Sampling from a teacher, a step of a training, or a student."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..backbones.apart import rested
from ..backbones.base import Backbone, encoded, guided
from ..backbones.generate import require_seed, trajectory
from ..config_fields import shortened, whole_number
from ..core import timegrid
from ..core.guidance import Guidance, guidance_of
from ..core.solvers import SOLVERS, State
from ..methods.method import student_of
from ..student.student import Student, require_steps_of
from ..tensors import finite
from ..training.loop import Step


def require_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the prompts as a list.

    Raises ValueError for a single string, whose letters would be the prompts, for an empty list, and for
    anything that is no string in UTF-8.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts: got the string {prompts!r}, allowed is a list of them; pass [{prompts!r}]")
    try:
        found = [] if isinstance(prompts, bytes | Mapping) else list(prompts)
    except TypeError as error:
        hint = f'; pass [""] * {prompts} for so many samples without prompts' if isinstance(prompts, int) else ""
        raise ValueError(f"prompts: got {shortened(prompts)}, allowed is a list of texts{hint}") from error
    if not found:
        raise ValueError('prompts: got none; pass at least one, [""] for a network without conditions')
    if odd := [p for p in found if not isinstance(p, str)]:
        raise ValueError(f"prompts: got {odd[0]!r} among them, allowed are strings")
    if broken := next((p for p in found if any("\ud800" <= c <= "\udfff" for c in p)), None):
        raise ValueError(f"prompts: {broken!r} has bytes that are no letters here; write it in UTF-8")
    return found


def sample(
    model: Backbone | Student | Step,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    *,
    steps: int | None = None,
    guidance: Guidance | float = 1.0,
    solver: str | None = None,
    condition: int | None = None,
) -> Tensor:
    """Sample images `[B, 3, H, W]` in [0, 1], one per prompt.

    Backbones without images return plain states.

    A step or a student has steps and a solver of its own, and takes no guidance, unless trained for several
    `guidance` scales. A teacher takes `steps` (default 50) and `guidance`. A student of several step counts
    is conditioned on `steps` unless `condition` is given. Seeds default to 0, 1, 2, ...; a seed gives the
    same image in any batch.

    Raises ValueError, and FloatingPointError for images that are not finite.
    """
    states = sample_trajectory(
        model, prompts, seeds, steps=steps, guidance=guidance, solver=solver, condition=condition
    )
    return decoded(model, states[-1].x)


def decoded(model: Backbone | Student | Step, state: Tensor) -> Tensor:
    """Decode clean states [B, ...] to images.

    Raises FloatingPointError for images that are not finite.
    """
    shown = backbone_of(model).decode(state)
    if not finite(shown):
        raise FloatingPointError(
            f"sample: the images of {backbone_of(model).name} are not finite; "
            "load it in float32 or bfloat16, or run fewstep doctor TEACHER"
        )
    return shown


def sample_trajectory(
    model: Backbone | Student | Step,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    *,
    steps: int | None = None,
    guidance: Guidance | float = 1.0,
    solver: str | None = None,
    condition: int | None = None,
) -> list[State]:
    """Sample as `sample` does, but return the whole trajectory.

    The trajectory has K + 1 states, each with the clean estimate that led to the state.
    """
    prompts = require_prompts(prompts)
    if isinstance(model, type) or not isinstance(model, Backbone | Student | Step):
        raise ValueError(
            f"model: got {shortened(model)}, allowed is a teacher, a student, or a step of fewstep.distill"
        )
    steps = None if steps is None else whole_number(steps, "steps")
    condition = None if condition is None else whole_number(condition, "condition")
    if solver is not None and (not isinstance(solver, str) or solver not in SOLVERS):
        raise ValueError(f"solver: got {shortened(solver)}, allowed are {', '.join(SOLVERS)}")
    if isinstance(seeds, int):
        raise ValueError(f"seeds: got {seeds}, allowed is a list of them; pass range({seeds}, {seeds + len(prompts)})")
    try:
        seeds = list(range(len(prompts)) if seeds is None else seeds)
    except TypeError as error:
        raise ValueError(f"seeds: got {shortened(seeds)}, allowed is a list of whole numbers, one a prompt") from error
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds: got {len(seeds)} for {len(prompts)} prompts; pass one seed a prompt")
    seeds = [require_seed(seed, "seeds") for seed in seeds]
    backbone, guidance = backbone_of(model), guidance_of(guidance)
    with torch.no_grad():
        cond, null = encoded(backbone, prompts)
    scale = guidance.scale if guidance.active else None
    if isinstance(model, Step):
        count = steps or model.method.counts[0]
        check_steps(model, count)
        _note_untrained(count, model.method.counts)
        times = model.method.times(backbone.schedule, count)
        with model.roles.averaged():
            denoise = student_of(model.method, model.roles, cond, condition or count, scale)
            return trajectory(backbone, denoise, seeds, times, solver or model.method.sampler, model.roles.head)
    if isinstance(model, Student):
        _note_untrained(count := steps or model.card.steps[0], model.card.steps)
        return model.sample_trajectory(cond, seeds, count, scale, solver, condition)
    backbone = rested(backbone)
    denoise = guided(backbone, backbone.module, cond, null, guidance)
    return trajectory(backbone, denoise, seeds, timegrid.uniform(backbone.schedule, steps or 50), solver or "ddim")


def _note_untrained(steps: int, trained: Sequence[int]) -> None:
    """Warn of a step count that the student was not trained for."""
    if steps not in trained:
        warnings.warn(
            f"steps: got {steps}, this student was trained for {', '.join(map(str, trained))}",
            UserWarning,
            stacklevel=5,
        )


def check_steps(model: Student | Step, steps: int, option: str = "steps") -> None:
    """Check that the student's head serves so many steps.

    Raises ValueError otherwise.
    """
    require_steps_of(model.roles.head if isinstance(model, Step) else model.head, steps, option)


def backbone_of(model: Backbone | Student | Step) -> Backbone:
    """Return the backbone behind anything that samples."""
    if isinstance(model, Step):
        return model.roles.backbone
    return model.backbone if isinstance(model, Student) else model
