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
from ..core.guidance import Guidance
from ..core.solvers import total_nfe
from ..evaluation.states import energy_distance, energy_noise, spread
from ..student.card import card_nfe
from ..student.student import Student
from ..training.loop import Step as Iteration
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
    if isinstance(model, Iteration) and not isinstance(model, Step):
        raise ValueError("model: got a step of the inner loop; pass one of fewstep.distill, or a student")
    student = model.snapshot() if isinstance(model, Step) else model
    teacher, card = backbone_of(student), student.card
    if isinstance(teacher, DiffusersBackbone):
        raise ValueError(
            f"model: {card.name} is a student of a diffusers pipeline, whose images are measured; "
            "save it and run: fewstep evaluate FOLDER"
        )
    if count < 32:
        raise ValueError(f"count: got {count}, allowed are whole numbers from 32")
    null = teacher.encode([""])
    if prompts is None and null:
        raise ValueError(f"prompts: got none, {teacher.name} has conditions; pass those that the student is for")
    asked = require_prompts([""] if prompts is None else prompts)
    truth = None if real is None else torch.as_tensor(real).float()
    if truth is not None and (truth.shape[1:] != tuple(teacher.shape) or len(truth) < 2):
        raise ValueError(f"real: got {list(truth.shape)}, allowed are states [N, {', '.join(map(str, teacher.shape))}]")
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
        write_json(Path(out), result)
    return result


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
