"""Distances of plain states between a student and its teacher.

For networks that sample no images, under one fixed protocol.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import write_json
from ..backbones.base import Backbone, nfe_per_step
from ..backbones.parts import DiffusersBackbone
from ..config_fields import shortened, whole_number
from ..core.guidance import Guidance
from ..core.solvers import total_nfe
from ..evaluation.states import energy_distance, energy_noise, spread
from ..names import require_path
from ..student.card import card_nfe
from ..student.student import Student
from ..words import told_in_python
from .sampling import backbone_of, require_prompts, sample
from .step import Step

PROTOCOL = "states"
TEACHER_STEPS = 50
CHUNK = 256  # states that are sampled at once


@told_in_python
def evaluate(
    model: Student | Step,
    prompts: Sequence[str] | None = None,
    real: Any = None,
    count: int = 512,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measure a student of a network of one's own.

    The student is compared with its teacher. The result is a dictionary, which is also written to `out` as
    JSON, where given:

    - `rows`: the teacher in 50 steps; then, for every step count K of the student, the teacher in K steps,
      guided and unguided, and the student in K steps. Each row has `count` states, the prompts in turn.
    - `noise`: the energy distance of two halves of the teacher's own states. A smaller distance is no
      difference.

    The numbers of a row:

    - `nfe`: network evaluations (NFE) per sample.
    - `energy_teacher`: the energy distance to the teacher's 50 steps from other noise.
    - `energy_real`: the energy distance to `real` `[N, ...]`, where given.
    - `diversity_ratio`: the spread of the row's states, relative to the spread of the teacher's.
    - `seconds_per_sample`: the time per sample.

    A network with conditions needs `prompts`, those that the student is for.
    Students of diffusers pipelines are measured by their images, with `fewstep evaluate FOLDER`. Raises
    ValueError.
    """
    if not isinstance(model, Student | Step):
        raise ValueError(f"model: got {shortened(model)}; pass a student, or a step of fewstep.distill")
    student = model.snapshot() if isinstance(model, Step) else model
    teacher, card = backbone_of(student), student.card
    if isinstance(teacher, DiffusersBackbone):
        raise ValueError(
            f"model: {card.name} is a student of a diffusers pipeline, whose images are measured; "
            "save it and run: fewstep evaluate FOLDER"
        )
    count, out = whole_number(count, "count", 32), None if out is None else require_path(out, "out")
    null = teacher.encode([""])
    if prompts is None and null:
        raise ValueError(f"prompts: got none, {teacher.name} has conditions; pass those that the student is for")
    asked = require_prompts([""] if prompts is None else prompts)
    truth = None if real is None else real_states(real, teacher, 2)
    best = card.guidance if null else Guidance()
    goal = _drawn(teacher, asked, count, count, TEACHER_STEPS, best)[0]

    def row(who: str, source: Backbone | Student, steps: int, guidance: Guidance, nfe: int) -> dict[str, Any]:
        states, seconds = _drawn(source, asked, count, 0, steps, guidance)
        return {
            "model": who,
            "steps": steps,
            "guidance": guidance.scale,
            "nfe": nfe,
            "n": count,
            "energy_teacher": energy_distance(states, goal),
            "energy_real": None if truth is None else energy_distance(states, truth),
            "diversity_ratio": spread(states) / max(spread(goal), 1e-12),
            "seconds_per_sample": seconds,
        }

    rows = [row("teacher", teacher, TEACHER_STEPS, best, total_nfe(TEACHER_STEPS, nfe_per_step(null, best)))]
    for k in card.steps:
        rows += [
            row("teacher", teacher, k, w, total_nfe(k, nfe_per_step(null, w)))
            for w in dict.fromkeys((best, Guidance()))
        ]
        rows.append(row("student", student, k, Guidance(), card_nfe(card, k)))
    half = count // 2
    result = {
        "protocol": PROTOCOL,
        "prompts": len(asked),
        "distance": "energy distance of plain states, zero for one distribution",
        "rows": rows,
        "noise": energy_noise(goal[:half], goal[half : 2 * half]),
    }
    if out is not None:
        write_json(out, result)
    return result


def real_states(real: Any, backbone: Backbone, least: int) -> Tensor:
    """Return real data as states [N, ...] of a backbone.

    Images of a pipeline are encoded. Raises ValueError for what holds no numbers, complex or infinite numbers, for
    another shape, and for samples that are all the same.
    """
    try:
        found = torch.as_tensor(real).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"real: got {shortened(real)}, allowed is a tensor or an array of clean data [N, ...]"
        ) from error
    if found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"real: got {str(found.dtype).removeprefix('torch.')}, allowed are real numbers")
    states = found.float()
    if isinstance(backbone, DiffusersBackbone) and states.shape[1:] != backbone.shape:
        states = backbone.encode_images(states)
    if not states.ndim or states.shape[1:] != tuple(backbone.shape) or len(states) < least:
        raise ValueError(
            f"real: got {list(states.shape)}, allowed are at least {least} states [N, "
            f"{', '.join(map(str, backbone.shape))}]"
        )
    if not bool(states.isfinite().all()) or not bool(states.var(0).any()):
        raise ValueError("real: its numbers are not finite, or all samples are the same; pass clean data")
    return states


def _drawn(
    source: Backbone | Student, prompts: list[str], count: int, first: int, steps: int, guidance: Guidance
) -> tuple[Tensor, float]:
    """Sample `count` states, with the prompts in turn.

    Returns (states `[count, ...]`, seconds per state). The seeds count up from `first`.
    """
    wanted, began, parts = [prompts[i % len(prompts)] for i in range(count)], time.perf_counter(), []
    for i in range(0, count, CHUNK):
        asked = wanted[i : i + CHUNK]
        parts.append(
            sample(source, asked, list(range(first + i, first + i + len(asked))), steps=steps, guidance=guidance)
            .float()
            .cpu()
        )
    return torch.cat(parts), (time.perf_counter() - began) / count
