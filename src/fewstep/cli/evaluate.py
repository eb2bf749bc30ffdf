"""`fewstep evaluate`: a student beside its teacher under a named protocol."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..api import LoadedStudent, backbone_of, load_student, sample
from ..atomic import read_json, write_json
from ..backbones.base import Backbone, calls
from ..backbones.load import quiet
from ..backbones.unconditional import PixelModel
from ..core.solvers import evaluations
from ..export.card import card_evaluations
from ..runs.students import student_folder
from ..training.loop import Step, default_device
from ..zoo.pixel_data import read_pixel_data
from .progress import console, meter
from .recipe import DistillRecipe

if TYPE_CHECKING:
    from ..evaluation.pictures import PictureProtocol
    from ..evaluation.plan import EmojiProtocol
    from ..evaluation.protocols import Row

TEACHER_STEPS = 50
EMOJI, PIXELS = "emoji-full", "pictures"  # the protocols of models that are asked in words, and of pixel models
CURVES = ("fd_real", "retrieval_top1", "retrieval_top5", "diversity")
COLUMNS = (
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
)


def run_evaluate(source: str, protocol: str | None, real: str | None, out: Path | None) -> None:
    """Evaluate, write JSON, print the table. `real` is by default what the run's recipe names."""
    quiet()
    folder = student_folder(source)
    if folder is None:
        raise ValueError(f"student: {source} is no student folder; pass a run or its final/ folder")
    result = evaluate_student(folder, protocol, folder / "evaluation", real or real_of(folder.parent))
    path = out or folder / "eval.json"
    write_json(path, result)
    print_table(result)
    console.print(str(path.resolve()))


def real_of(run: Path) -> str | None:
    """The real pictures that a run's recipe names, if it is a run and does."""
    record = run / "run.json"
    recipe = read_json(record, f"delete {record}").get("recipe", {}) if record.is_file() else {}
    stages = [recipe, recipe.get("first") or {}]
    return next((data["real"] for stage in stages if (data := stage.get("data")) and data.get("real")), None)


def evaluate_student(folder: Path, protocol: str | None, cache: Path, real: str | None = None) -> dict[str, Any]:
    """The `rows_of` a student under a named protocol, or that of its teacher's kind; also `folder/eval.json`."""
    from ..evaluation.pictures import PictureProtocol, evaluate_pictures  # seconds to import, and not every run evaluates
    from ..evaluation.protocols import evaluate

    student = load_student(folder, device=default_device())
    teacher = backbone_of(student)
    rules, seen = measuring(teacher, protocol, real)
    rows = rows_of(student)
    each, calls = rules.total(1), [row.nfe for row in rows]
    with meter("evaluating, network calls", each * sum(calls)) as bar:

        def tell(done: int) -> None:  # a teacher's picture takes as long as dozens of a student's
            row, drawn = divmod(done, each)
            bar.advance(each * sum(calls[:row]) + drawn * sum(calls[row : row + 1]), {})

        if isinstance(rules, PictureProtocol):
            measured = evaluate_pictures(rows, rules, classes_of(teacher), seen, cache, tell)
        else:
            measured = evaluate(rows, rules, cache, tell)
    result = {**measured, "guidance_rescale": student.card.guidance_rescale}
    write_json(folder / "eval.json", result)
    return result


def measuring(
    teacher: Backbone, name: str | None, real: str | None, option: str = "--protocol"
) -> "tuple[EmojiProtocol | PictureProtocol, Tensor | None]":
    """The protocol of this name, or the one for this kind of teacher, and the real pictures that it is to meet, as bytes.

    Raises ValueError where they do not go together.
    """
    from ..evaluation.pictures import PICTURES, PictureProtocol
    from ..evaluation.protocols import PROTOCOLS

    pixels = isinstance(teacher, PixelModel)
    rules = protocol_named(name or (PIXELS if pixels else EMOJI))
    if isinstance(rules, PictureProtocol) != pixels:
        kind, allowed = ("a pixel model", PICTURES) if pixels else ("no pixel model", PROTOCOLS)
        raise ValueError(f"{option}: got {rules.name}, {teacher.name} is {kind}; choose one of {', '.join(p.name for p in allowed)}")
    if real is None:
        return rules, None
    try:
        if not isinstance(rules, PictureProtocol):
            raise ValueError(f"got {real}, protocol {rules.name} has real pictures of its own; leave it out")
        return rules, real_pictures(real, teacher, rules)
    except ValueError as error:
        raise ValueError(f"{'--real' if option == '--protocol' else 'data.real'}: {error}") from error


def real_pictures(real: str, teacher: Backbone, rules: "PictureProtocol") -> Tensor:
    """Bytes [N, C, H, W] of a folder, an npz or IDX files. Raises ValueError where there are too few, or of another size than the teacher's."""
    if not Path(real).exists():
        raise ValueError(f"there is no {real}; pass a folder of pictures or an npz")
    try:
        images = read_pixel_data(real).images
    except ValueError as error:
        raise ValueError(str(error).removeprefix("data: ")) from error
    if len(images) < rules.count:
        raise ValueError(
            f"{real} has {len(images)} pictures, protocol {rules.name} compares {rules.count} with {rules.count}; pass more, or choose a smaller protocol"
        )
    size = teacher.picture_size
    if images.shape[2:] != (size, size):
        got = "x".join(map(str, images.shape[2:]))
        raise ValueError(f"the pictures of {real} are {got}, {teacher.name} draws {size}x{size}; scale them as it has seen them")
    return images


def classes_of(teacher: Backbone) -> tuple[str, ...]:
    """What a pixel model can be asked for; empty where that is nothing."""
    return teacher.labels if isinstance(teacher, PixelModel) else ()


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


def protocol_named(name: str) -> "EmojiProtocol | PictureProtocol":
    """Of all there are. Raises ValueError with their names."""
    from ..evaluation.pictures import PICTURES
    from ..evaluation.protocols import PROTOCOLS

    known: dict[str, EmojiProtocol | PictureProtocol] = {p.name: p for p in (*PROTOCOLS, *PICTURES)}
    if name not in known:
        raise ValueError(f"protocol: got {name!r}; choose one of {', '.join(known)}")
    return known[name]


def check_measures(recipe: DistillRecipe, teacher: Backbone | None = None) -> None:
    """Raises ValueError for what cannot be measured, before anything is trained: of the names alone, and of the `teacher` when it is there."""
    named = [(option, name) for option, name in (("evaluate", recipe.evaluate), ("preview.measure", recipe.preview.measure)) if name]
    for option, name in named:
        if teacher is None:
            protocol_named(name)
        elif measuring(teacher, name, recipe.real, option)[1] is None and isinstance(teacher, PixelModel) and option == "preview.measure":
            raise ValueError(f"preview.measure: got {name}, which needs real pictures here; set data.real, or leave it out")


def measure_step(step: Step, protocol: str, real: str | None = None) -> dict[str, Any]:
    """The averaged student of a running distillation, without the teacher beside it: what a quality curve needs."""
    from ..evaluation.pictures import PictureProtocol, evaluate_pictures
    from ..evaluation.protocols import Row, evaluate

    count = step.method.counts[0]
    nfe = evaluations(count, free=step.method.free_first)
    rows, teacher = [Row("student", count, 1.0, nfe, _sampler(step, count, 1.0))], backbone_of(step)
    rules, seen = measuring(teacher, protocol, real)
    found = evaluate_pictures(rows, rules, classes_of(teacher), seen) if isinstance(rules, PictureProtocol) else evaluate(rows, rules)
    return {k: v for k, v in found["rows"][0].items() if k in CURVES}


def _sampler(model: Backbone | LoadedStudent | Step, steps: int, guidance: float) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return sample(model, list(prompts), list(seeds), steps=steps, guidance=guidance)

    return draw


def print_table(result: dict[str, Any]) -> None:
    """The rows as a person reads them, and what is measured in how many pictures; columns that no row fills are left out."""
    names = [n for n in COLUMNS if any(row.get(n) is not None for row in result["rows"])]
    console.print("  ".join(f"{n[:10]:>10}" for n in names))
    for row in result["rows"]:
        console.print("  ".join(f"{row[n]:>10.3f}" if isinstance(row.get(n), float) else f"{row.get(n)!s:>10}" for n in names))
    console.print(f"{result['protocol']}: {result['distance']}; {result['rows'][0]['n']} pictures a row")
