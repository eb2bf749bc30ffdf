"""`fewstep evaluate`: a student beside its teacher under a named protocol."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..api import LoadedStudent, backbone_of, load_student, sample
from ..atomic import write_json
from ..backbones.base import Backbone, calls
from ..backbones.load import quiet
from ..core.solvers import evaluations
from ..export.card import card_evaluations
from ..training.loop import Step, default_device
from .progress import console, meter
from .sample import student_folder

if TYPE_CHECKING:
    from ..evaluation.protocols import Row

TEACHER_STEPS = 50


def run_evaluate(source: str, protocol: str, out: Path | None) -> None:
    """Evaluate, write JSON, print the table."""
    quiet()
    folder = student_folder(source)
    if folder is None:
        raise ValueError(f"student: {source} is no student folder; pass a run or its final/ folder")
    result = evaluate_student(folder, protocol, folder / "evaluation")
    path = out or folder / "eval.json"
    write_json(path, result)
    print_table(result)
    console.print(str(path.resolve()))


def evaluate_student(folder: Path, protocol: str, cache: Path) -> dict[str, Any]:
    """The `rows_of` a student under a named protocol; also `folder/eval.json`."""
    from ..evaluation.protocols import evaluate, protocol_named  # seconds to import, and not every run evaluates

    rules = protocol_named(protocol)
    student = load_student(folder, device=default_device())
    rows = rows_of(student)
    with meter("evaluating", rules.total(len(rows))) as bar:
        measured = evaluate(rows, rules, cache, progress=lambda done: bar.advance(done, {}))
    result = {**measured, "guidance_rescale": student.card.guidance_rescale}
    write_json(folder / "eval.json", result)
    return result


def rows_of(student: LoadedStudent) -> "list[Row]":
    """Teacher@50, then for every K served teacher@K guided, teacher@K unguided and student@K.

    Of a teacher that was not guided, or has nothing to be guided by, the two are one.
    """
    from ..evaluation.protocols import Row

    teacher, card = backbone_of(student), student.card
    null = teacher.encode([""])
    best = card.teacher_guidance if null else 1.0

    def of_teacher(steps: int, scale: float) -> Row:
        return Row("teacher", steps, scale, evaluations(steps, calls(null, scale)), _sampler(teacher, steps, scale))

    rows = [of_teacher(TEACHER_STEPS, best)]
    for k in card.steps:
        rows += [of_teacher(k, scale) for scale in dict.fromkeys((best, 1.0))]
        rows.append(Row("student", k, 1.0, card_evaluations(card, k), _sampler(student, k, 1.0)))
    return rows


def check_protocols(*names: str | None) -> None:
    """Raises ValueError for a protocol that is not there, before anything is trained."""
    if any(names):
        from ..evaluation.protocols import protocol_named

        for name in filter(None, names):
            protocol_named(name)


def measure_step(step: Step, protocol: str) -> dict[str, Any]:
    """The averaged student of a running distillation, without the teacher beside it: what a quality curve needs."""
    from ..evaluation.protocols import Row, evaluate, protocol_named

    count = step.method.counts[0]
    nfe = evaluations(count, free=step.method.free_first)
    row = evaluate([Row("student", count, 1.0, nfe, _sampler(step, count, 1.0))], protocol_named(protocol))["rows"][0]
    return {k: row[k] for k in ("fd_real", "retrieval_top1", "retrieval_top5", "diversity")}


def _sampler(model: Backbone | LoadedStudent | Step, steps: int, guidance: float) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return sample(model, list(prompts), list(seeds), steps=steps, guidance=guidance)

    return draw


def print_table(result: dict[str, Any]) -> None:
    """The rows as a person reads them."""
    names = [
        "model",
        "steps",
        "guidance",
        "nfe",
        "fd_real",
        "fd_teacher",
        "retrieval_top1",
        "retrieval_top5",
        "tone",
        "held_out_tone",
        "diversity_ratio",
        "seconds_per_image",
    ]
    console.print("  ".join(f"{n[:10]:>10}" for n in names))
    for row in result["rows"]:
        console.print("  ".join(f"{row[n]:>10.3f}" if isinstance(row.get(n), float) else f"{row.get(n)!s:>10}" for n in names))
