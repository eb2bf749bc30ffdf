"""`fewstep evaluate`: a student next to its teacher under a protocol."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from ..atomic import write_json
from ..backbones.base import Backbone, nfe_per_step
from ..backbones.load import BUNDLED, quiet
from ..backbones.miniature import load_tokenizer
from ..backbones.sd import StableDiffusion
from ..backbones.unconditional import PixelModel
from ..core.guidance import Guidance
from ..core.solvers import total_nfe
from ..data.prompts import find_prompts
from ..reading import object_in, reading
from ..runs.recipe import DistillRecipe
from ..runs.sampling import backbone_of, sample
from ..student.card import card_nfe
from ..student.folder import require_folder
from ..student.student import Student
from ..training.loop import Step
from ..typed import typed
from ..zoo.pixel_data import read_pixel_data
from .preflight import require_output
from .progress import console, meter
from .prompts import prompts_from
from .sample import open_student

if TYPE_CHECKING:
    from ..evaluation.images import ImageProtocol
    from ..evaluation.plan import EmojiProtocol
    from ..evaluation.protocols import Row

TEACHER_STEPS = 50
SIZES = ("quick", "medium", "full")  # of the protocols for the teacher's kind
ANY = "images-N (of N images)"


def run_evaluate(source: str, protocol: str | None, real: str | None, prompts: str | None, out: Path | None) -> None:
    """Evaluate a student, write JSON and print the table.

    By default `real` and `prompts` are those of the run's recipe.
    """
    quiet()
    if out is not None:
        require_output(out, "-o")
    folder = require_folder(source, "student")
    asked = None if prompts is None else find_prompts(prompts)[0]
    result = evaluate_student(folder, protocol, folder / "evaluation", real or real_of(folder.parent), asked)
    path = out or folder / "eval.json"
    write_json(path, result)
    print_table(result)
    console.print(str(path.resolve()))


class Data(TypedDict, total=False):
    """The part of a recipe's `data` that an evaluation reads."""

    real: str | None


class Stage(TypedDict, total=False):
    """The part of a stage that an evaluation reads."""

    data: Data | None


class PromptsRecord(TypedDict, total=False):
    """The part of a recipe's `prompts` that an evaluation reads."""

    source: str
    column: str | None


class Recipe(Stage, total=False):
    """The part of a recipe that an evaluation reads.

    A run from Python records the teacher's settings, not a name, and no file names.
    """

    warm_start: Stage | None
    first: Stage | None  # the warm start of runs of fewstep 0.1.0
    prompts: PromptsRecord
    teacher: str | dict[str, Any]


class Record(TypedDict, total=False):
    """The part of `run.json` that an evaluation reads."""

    recipe: Recipe


def recipe_of(run: Path) -> Recipe:
    """Read the recipe of a run.

    Empty where the folder has no `run.json`. Raises ReadError where the file holds anything else.
    """
    record = run / "run.json"
    if not record.is_file():
        return {}
    with reading(record, f"delete {record}"):
        found: Record = typed(Record, object_in(record))
    return found.get("recipe", {})


def real_of(run: Path) -> str | None:
    """Return the real images that a run's recipe names.

    None where the folder is no run, or where the recipe names none.
    """
    recipe = recipe_of(run)
    stages: list[Stage] = [recipe, recipe.get("warm_start") or recipe.get("first") or {}]
    named = [(stage.get("data") or {}).get("real") for stage in stages]
    return next((real for real in named if real), None)


def asked_of(teacher: Backbone, run: Path, prompts: Sequence[str] | None, rules: "ImageProtocol") -> tuple[str, ...]:
    """Return the prompts that a teacher is evaluated with.

    A pixel model has classes for prompts. Any other teacher takes some of `prompts`, by default of the run's
    prompts. Raises ValueError where there are none.
    """
    from ..evaluation.images import chosen

    if isinstance(teacher, PixelModel):
        return teacher.labels
    if prompts is not None:
        return chosen(rules, prompts)
    return chosen(rules, own_prompts(teacher, run))


def own_prompts(teacher: Backbone, run: Path) -> list[str]:
    """Return the prompts that a run was trained with.

    Raises ValueError where there is no run, and where its prompts are not there any more.
    """
    recipe = recipe_of(run)
    named = recipe.get("teacher")
    if not isinstance(named, str):
        raise ValueError(
            f"--prompts: there is no run around {run} that says what {teacher.name} was asked for; pass a prompt file"
        )
    told: PromptsRecord = recipe.get("prompts", {})
    try:
        return prompts_from(str(told.get("source", "bundled")), told.get("column"), named)
    except ValueError as error:
        raise ValueError(f"{error}; or pass --prompts FILE") from error


def evaluate_student(
    folder: Path, protocol: str | None, cache: Path, real: str | None = None, prompts: Sequence[str] | None = None
) -> dict[str, Any]:
    """Evaluate a student under a protocol and write `folder/eval.json`.

    The rows are those of `rows_of`. Without a name, the protocol is that of the teacher's kind. `prompts`
    are for text-to-image models other than emoji models; by default the prompts are those of the run around
    `folder`.
    """
    # These imports take seconds, and not every run evaluates.
    from ..evaluation.images import ImageProtocol, evaluate_images
    from ..evaluation.protocols import evaluate

    student = open_student(folder)
    teacher = backbone_of(student)
    rules, seen = measuring(teacher, protocol, real)
    asked = asked_of(teacher, folder.parent, prompts, rules) if isinstance(rules, ImageProtocol) else ()
    rows = rows_of(student)
    each, calls = rules.total(1), [row.nfe for row in rows]
    with meter("evaluating, NFE", each * sum(calls)) as bar:

        def tell(done: int) -> None:  # a teacher's image takes as long as dozens of a student's
            row, drawn = divmod(done, each)
            bar.advance(each * sum(calls[:row]) + drawn * sum(calls[row : row + 1]), {})

        if isinstance(rules, ImageProtocol):
            measured = evaluate_images(rows, rules, asked, seen, cache, tell)
        else:
            measured = evaluate(rows, rules, cache, tell)
    result = {**measured, "guidance": asdict(student.card.guidance)}
    write_json(folder / "eval.json", result)
    return result


def measuring(
    teacher: Backbone, name: str | None, real: str | None, option: str = "--protocol"
) -> "tuple[EmojiProtocol | ImageProtocol, Tensor | None]":
    """Return the protocol for a teacher, and the real images.

    `name` is the name or the size of a protocol; None stands for the protocol of the teacher's kind. The
    real images are bytes `[N, C, H, W]`, None where `real` is None.

    Raises ValueError where protocol, teacher and real images do not go together, and for a teacher that
    samples no images.
    """
    from ..evaluation.images import ImageProtocol

    if not teacher.image_size:
        raise ValueError(
            f"{option}: {teacher.name} samples no single images, and nothing else is measured yet; "
            "leave it out, and look at the run's samples/ and report"
        )
    emoji = draws_emoji(teacher)
    own: dict[str, EmojiProtocol | ImageProtocol] = {p.name: p for p in protocols_of(emoji)}
    by_size = dict(zip(SIZES, own, strict=False))
    usual = "full" if emoji else "medium" if isinstance(teacher, PixelModel) else "quick"  # others may be large
    rules = protocol_named(by_size.get(name or usual, name or list(own)[-1]))
    if isinstance(rules, ImageProtocol) == emoji:
        kind = (
            "samples emoji"
            if emoji
            else "is a pixel model"
            if isinstance(teacher, PixelModel)
            else "knows no emoji by name"
        )
        raise ValueError(
            f"{option}: got {rules.name}, {teacher.name} {kind}; "
            f"choose one of {', '.join(own)}{'' if emoji else f', {ANY}'}"
        )
    if real is None:
        return rules, None
    try:
        if not isinstance(rules, ImageProtocol):
            raise ValueError(f"got {real}, protocol {rules.name} has real images of its own; leave it out")
        return rules, real_images(real, teacher, rules)
    except ValueError as error:
        raise ValueError(f"{'--real' if option == '--protocol' else 'data.real'}: {error}") from error


def draws_emoji(teacher: Backbone) -> bool:
    """Return whether a model takes the names of emoji.

    The bundled model does, and so do all models with the same vocabulary, such as fine-tunes of the bundled
    model.
    """
    return (
        isinstance(teacher, StableDiffusion)
        and teacher.pipe.tokenizer.get_vocab() == load_tokenizer(BUNDLED / "emoji" / "tokenizer").get_vocab()
    )


def protocols_of(emoji: bool) -> "Sequence[EmojiProtocol | ImageProtocol]":
    """Return the protocols for one kind of teacher, smallest first."""
    from ..evaluation.images import IMAGES
    from ..evaluation.protocols import PROTOCOLS

    return PROTOCOLS if emoji else IMAGES


def real_images(real: str, teacher: Backbone, rules: "ImageProtocol") -> Tensor:
    """Read real images as bytes `[N, C, H, W]`.

    `real` is a folder, an npz or IDX files. Raises ValueError where there are too few images, or where the
    images have another size than the teacher's.
    """
    if not Path(real).exists():
        raise ValueError(f"there is no {real}; pass a folder of images or an npz")
    try:
        images = read_pixel_data(real).images
    except ValueError as error:
        raise ValueError(str(error).removeprefix("data: ")) from error
    if len(images) < rules.count:
        raise ValueError(
            f"{real} has {len(images)} images, protocol {rules.name} compares "
            f"{rules.count} with {rules.count}; pass more, or choose a smaller protocol"
        )
    size = teacher.image_size
    if images.shape[2:] != (size, size):
        got = "x".join(map(str, images.shape[2:]))
        raise ValueError(
            f"the images of {real} are {got}, {teacher.name} draws {size}x{size}; scale them as it has seen them"
        )
    return images


def rows_of(student: Student) -> "list[Row]":
    """Return the rows that compare a student with its teacher.

    The first row is teacher@50. Then follow, for every step count K of the student: teacher@K, guided and
    unguided; all that the teacher samples at the student's cost; and student@K.

    At a student's cost of c NFE the teacher takes c unguided steps, or half as many guided steps: which is
    better is not known before. For a teacher without guidance the guided and the unguided row are the same
    row.
    """
    from ..evaluation.protocols import Row

    teacher, card = backbone_of(student), student.card
    null = teacher.encode([""])
    best = card.guidance if null else Guidance()
    ways, each = tuple(dict.fromkeys((best, Guidance()))), nfe_per_step(null, best)
    rows: dict[tuple[str, int, Guidance], Row] = {}

    def add_teacher(steps: int, guidance: Guidance) -> None:
        cost = total_nfe(steps, nfe_per_step(null, guidance))
        rows.setdefault(
            ("teacher", steps, guidance), Row("teacher", steps, guidance, cost, _sampler(teacher, steps, guidance))
        )

    add_teacher(TEACHER_STEPS, best)
    for k in card.steps:
        cost = card_nfe(card, k)
        for guidance in ways:
            add_teacher(k, guidance)
        if cost:
            add_teacher(cost, Guidance())
        if cost and cost % each == 0:
            add_teacher(cost // each, best)
        rows["student", k, Guidance()] = Row("student", k, Guidance(), cost, _sampler(student, k, Guidance()))
    return list(rows.values())


def protocol_named(name: str) -> "EmojiProtocol | ImageProtocol":
    """Return the protocol of this name.

    Raises ValueError with all names for an unknown name.
    """
    from ..evaluation.images import images_named

    known = {p.name: p for emoji in (True, False) for p in protocols_of(emoji)}
    if (found := known.get(name) or images_named(name)) is None:
        raise ValueError(
            f"protocol: got {name!r}; choose one of {', '.join(known)}, {ANY}, or a size: {', '.join(SIZES)}"
        )
    return found


def check_measures(recipe: DistillRecipe, teacher: Backbone | None = None) -> None:
    """Check before the training that the recipe's protocols can be measured.

    Without `teacher`, the names alone are checked. A recipe that says only a size is for teachers of every
    kind: where such a teacher cannot be measured during the training, a line says so. Raises ValueError.
    """
    from ..evaluation.images import ImageProtocol

    for option, name in (("evaluate", recipe.evaluate), ("preview.protocol", recipe.preview.protocol)):
        if name is None:
            continue
        if teacher is None:
            if name not in SIZES:
                protocol_named(name)
            continue
        rules, seen = measuring(teacher, name, recipe.real, option)
        if option == "preview.protocol" and seen is None and isinstance(rules, ImageProtocol):
            if name not in SIZES:
                raise ValueError(
                    f"preview.protocol: got {name}, which needs real images here; set data.real, or leave it out"
                )
            console.print(
                (
                    f"preview.protocol: {teacher.name} is not measured along the way, "
                    "which takes real images (data.real)"
                ),
                markup=False,
            )


def measure_step(step: Step, protocol: str, real: str | None = None, prompts: Sequence[str] = ("",)) -> dict[str, Any]:
    """Measure the averaged student of a running distillation.

    The numbers are those of a quality curve, without the teacher's rows. Empty where the student could only
    be compared with the teacher.
    """
    from ..evaluation.images import ImageProtocol, evaluate_images
    from ..evaluation.metrics import METRICS
    from ..evaluation.protocols import Row, evaluate

    count = step.method.counts[0]
    nfe = total_nfe(count, analytic=step.method.analytic_first_step)
    rows, teacher = [Row("student", count, Guidance(), nfe, _sampler(step, count, Guidance()))], backbone_of(step)
    rules, seen = measuring(teacher, protocol, real)
    if not isinstance(rules, ImageProtocol):
        found = evaluate(rows, rules)
    elif seen is None:
        return {}
    else:
        found = evaluate_images(rows, rules, asked_of(teacher, Path(), prompts, rules), seen)
    return {k: v for k, v in found["rows"][0].items() if k in METRICS and METRICS[k].curve}


def _sampler(
    model: Backbone | Student | Step, steps: int, guidance: Guidance
) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return sample(model, list(prompts), list(seeds), steps=steps, guidance=guidance)

    return draw


def print_table(result: dict[str, Any]) -> None:
    """Print the rows, the distance and the number of images.

    Columns that no row fills are left out.
    """
    from ..evaluation.metrics import METRICS

    columns = ("model", "steps", "guidance", "nfe", *(m.key for m in METRICS.values() if m.printed))
    names = [n for n in columns if any(row.get(n) is not None for row in result["rows"])]
    wide = {n: max(len(n), 8) for n in names}
    console.print("  ".join(f"{n:>{wide[n]}}" for n in names))
    for row in result["rows"]:
        cells = {n: f"{row[n]:.3f}" if isinstance(row.get(n), float) else str(row.get(n)) for n in names}
        console.print("  ".join(f"{cells[n]:>{wide[n]}}" for n in names))
    console.print(f"{result['protocol']}: {result['distance']}; {result['rows'][0]['n']} images a row")
