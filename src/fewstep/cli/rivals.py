"""Other students beside one's own: public ones by name, or folders."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..backbones.base import Backbone
from ..backbones.load import pipeline_of
from ..backbones.parts import DiffusersBackbone
from ..backbones.rivals import Rival, draw_rival, rival_named, rival_pipeline
from ..core.guidance import Guidance
from ..runs.sampling import decoded, sample_trajectory
from ..student.card import card_nfe
from ..student.folder import find_student
from ..student.student import Student

if TYPE_CHECKING:
    from ..evaluation.measure import Sampler
    from ..evaluation.protocols import Row


def rival_rows(teacher: Backbone, names: Sequence[str]) -> "list[Row]":
    """Return the rows of other students, in all their step counts.

    A name is that of a public student, or a folder with a student of fewstep, which is read onto the same teacher.
    Raises ValueError in one line.
    """
    from ..evaluation.protocols import Row

    found: list[Row] = []
    for name in names:
        folder = find_student(name, "--against")
        if folder is None:
            found.append(_public(teacher, name))
            continue
        student = Student.read(folder, teacher)
        found += [
            Row(student.card.name, k, Guidance(), card_nfe(student.card, k), _of_student(student, k))
            for k in student.card.steps
        ]
    return found


def _public(teacher: Backbone, name: str) -> "Row":
    from ..evaluation.protocols import Row
    from ..evaluation.weights import Weights, find_weights

    if not isinstance(teacher, DiffusersBackbone):
        raise ValueError(f"--against: got {name}, public students are of diffusers pipelines; pass a student's folder")
    base = pipeline_of(teacher)
    rival = rival_named(name, base)
    files = find_weights(Weights(rival.repo, rival.files), f"--against {name}")
    pipe = rival_pipeline(base, rival, files.folder)
    each = 2 if rival.guidance > 1 else 1
    return Row(
        name,
        rival.steps,
        Guidance(scale=max(rival.guidance, 1.0)),
        each * rival.steps,
        _of_pipeline(pipe, rival, teacher),
    )


def _of_pipeline(pipe: object, rival: Rival, teacher: Backbone) -> "Sampler":
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return draw_rival(pipe, rival, prompts, seeds, teacher.shape, teacher.image_size)

    return draw


def _of_student(student: Student, steps: int) -> "Sampler":
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        state = sample_trajectory(student, list(prompts), list(seeds), steps=steps)[-1].x
        return decoded(student, state), state

    return draw
