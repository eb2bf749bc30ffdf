"""Students of diffusers pipelines as pipelines that are right at `pipe(prompt)`."""

from pathlib import Path
from typing import Any

import torch

from ..backbones.base import Backbone
from ..backbones.few_step import FewStepPipeline, Serving, few_step_pipeline
from ..backbones.files import load_lora, load_vectors, loads_lora
from ..backbones.generate import device_of
from ..backbones.load import around, pipeline_of
from ..backbones.parts import denoiser_of
from ..backbones.student_scheduler import Walking
from ..begin import require_own
from ..core import timegrid
from ..core.solvers import solver_named
from ..export.card import StudentCard, read_card
from ..roles.adapters import switch
from ..roles.step_condition import attach, nearest, unfold, width
from ..roles.student import with_lora
from ..trajp.files import load_head


def load(base: Any, student: str | Path) -> FewStepPipeline:
    """A diffusers pipeline that is right at `pipe(prompt)`: scheduler, times, steps and guidance come from the student.

    `base` is a pipeline, or what `load_teacher` takes.
    """
    folder = Path(student)
    card = read_card(folder)
    pipeline, adapter = pipeline_of(base), "fewstep"
    backbone = around(pipeline, card.base)
    require_own(card, backbone, folder)
    walking = _walking(card, backbone, folder)
    pipe = few_step_pipeline(pipeline, folder, Serving(card.steps, card.size, card.scales), card.weights, walking, adapter)
    network = denoiser_of(pipe)
    if card.weights == "lora" and not loads_lora(network):
        assert card.rank is not None and card.alpha is not None
        student_on_it = with_lora(around(pipe, card.base), load_lora(folder), card.rank, card.alpha)
        switch(student_on_it.layers, adapter := student_on_it.adapter)
    if card.time_layer:
        vectors = load_vectors(folder, card.told, width(network, card.time_layer))
        unfold(network, card.time_layer, vectors[card.told[0]], adapter)
        condition = attach(network, card.time_layer)

        def tell(steps: int, guidance: float) -> None:
            condition.active = nearest(vectors, guidance if card.scales else steps)

        pipe.tell = tell
        tell(card.steps[0], card.told[0])  # pipelines made from this one, as for image-to-image, tell it nothing
    return pipe


def _walking(card: StudentCard, backbone: Backbone, folder: Path) -> Walking | None:
    """How a student is sampled that no stock scheduler can walk; None for all others."""
    solver = card.solver[str(card.steps[0])]
    grids = {int(k): torch.tensor(times, dtype=torch.float64) for k, times in card.timesteps.items()}
    even = all(timegrid.even(backbone.schedule, times) for times in grids.values())
    if even and not (card.head or card.free_first or solver == "ipndm"):
        return None
    head = load_head(folder, backbone.schedule).to(device_of(backbone.module)) if card.head else None
    return Walking(backbone.schedule, backbone.row, solver_named(solver), grids, head, card.free_first)
