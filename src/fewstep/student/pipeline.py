"""Students as diffusers pipelines that are right at `pipe(prompt)`."""

import copy
from pathlib import Path
from typing import Any

import torch

from ..backbones.experts import Experts
from ..backbones.families import family_of_pipeline
from ..backbones.few_step import FewStepPipeline, SamplingDefaults, few_step_pipeline
from ..backbones.files import loads_lora
from ..backbones.generate import device_of
from ..backbones.load import around, at_size, pipeline_of
from ..backbones.parts import DiffusersBackbone, denoiser_of
from ..backbones.schedulers import load_scheduler
from ..backbones.step_switch import switch_by_time, times_told
from ..backbones.student_scheduler import SamplingSpec, StudentScheduler
from ..core import timegrid
from ..core.schedule import Flow, Schedule
from ..core.solvers import solver_named
from ..roles.adapters import attach_adapter
from ..roles.step_condition import attach, nearest, unfold
from .base import require_own
from .card import StudentCard, first_times
from .folder import Parts, read_card, read_parts, require_folder, scheduler_path

ADAPTER = "fewstep"


def load(base: Any, student: str | Path) -> FewStepPipeline:
    """Return a diffusers pipeline that is right at `pipe(prompt)`.

    Scheduler, times, steps and guidance come from the student. `base` is a pipeline, or what `load_teacher`
    takes; `student` is a run or its `final/`.
    """
    folder = require_folder(student, "student")
    card = read_card(folder)
    backbone = at_size(around(pipeline_of(base), card.base), card.size or None)
    pipeline = pipeline_of(backbone)
    require_own(card, backbone, folder)
    if card.per_step and card.weights == "full":
        raise ValueError(
            f"student: {folder} has a whole network for each of its {card.steps[0]} steps, and a pipeline has one; "
            f"sample it with fewstep.sample(fewstep.load_student({str(folder)!r}), [PROMPT])"
        )
    parts = read_parts(folder, backbone)
    plain = denoiser_of(pipeline)
    # New modules around the same weights: the LoRA goes on this pipeline, and `base` stays the teacher.
    shared: dict[int, Any] = {id(t): t for t in (*plain.parameters(), *plain.buffers())}
    network = copy.deepcopy(plain, shared) if parts.network is None else parts.network
    patch = family_of_pipeline(pipeline).patch
    spec = sampling_spec(parts, backbone.schedule, backbone.row, device_of(plain), patch)
    scheduler = (
        load_scheduler(scheduler_path(folder)) if spec is None else StudentScheduler.of(pipeline.scheduler.config, spec)
    )
    assert isinstance(backbone, DiffusersBackbone)
    told = card.guidance.scale if backbone.embeds_guidance else 1.0
    defaults = SamplingDefaults(card.steps, card.size, card.guidance_scales, told)
    pipe = few_step_pipeline(pipeline, network, scheduler, defaults)
    if card.weights == "lora" and loads_lora(network) and not isinstance(network, Experts) and not card.per_step:
        pipe.load_lora_weights(str(folder), adapter_name=ADAPTER)
        pipe.enable_lora()  # the adapters of a base are off after a training
        if parts.vectors:
            unfold(backbone, network, parts.vectors[card.condition_values[0]], first_times(card), ADAPTER)
    elif card.weights == "lora":
        assert card.rank is not None and card.alpha is not None
        each = [
            attach_adapter(network, own.lora, card.rank, card.alpha)
            for own in (parts, *parts.later)
            if own.lora is not None
        ]
        each[0].switch(True)
        if card.per_step:
            switch_by_time(network, times_told(backbone, network, first_times(card)), lambda k: each[k].switch(True))
    if parts.vectors:
        vectors, condition = parts.vectors, attach(network, card.time_layer)

        def set_condition(steps: int, guidance: float) -> None:
            condition.active = nearest(vectors, guidance if card.guidance_scales else steps)

        pipe.set_condition = set_condition
        # Pipelines made from this one, as for image-to-image, set no condition.
        set_condition(card.steps[0], card.condition_values[0])
    return pipe


def sampling_spec(
    parts: Parts, schedule: Schedule, row: Any, device: torch.device, patch: int = 0
) -> SamplingSpec | None:
    """Return how to sample a student that needs more than stock schedulers.

    None for a student that a stock scheduler samples.
    """
    card: StudentCard = parts.card
    solver = solver_named(card.solver[str(card.steps[0])])
    grids = {int(k): torch.tensor(times, dtype=torch.float64) for k, times in card.timesteps.items()}
    even = all(timegrid.even(schedule, times) for times in grids.values())
    # Pipelines of flow hand their scheduler no generator, of which the noise of each step could come.
    unseeded = solver.stochastic and isinstance(schedule, Flow)
    if even and solver.stock and not (card.head or card.analytic_first_step or unseeded):
        return None
    head = None if parts.head is None else parts.head.to(device)
    return SamplingSpec(schedule, row, solver, grids, head, card.analytic_first_step, patch)
