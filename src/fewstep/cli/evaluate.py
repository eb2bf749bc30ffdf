"""`fewstep evaluate`: a student beside its teacher under a named protocol."""

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
    from ..evaluation.pictures import PictureProtocol
    from ..evaluation.plan import EmojiProtocol
    from ..evaluation.protocols import Row

TEACHER_STEPS = 50
SIZES = ("quick", "medium", "full")  # each stands for the protocol of this size of the teacher's kind
ANY = "pictures-N (of N pictures)"


def run_evaluate(source: str, protocol: str | None, real: str | None, prompts: str | None, out: Path | None) -> None:
    """Evaluate, write JSON, print the table. `real` and `prompts` are by default what the run's recipe names."""
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
    """Of a recipe's `data`, what an evaluation asks for."""

    real: str | None


class Stage(TypedDict, total=False):
    """Of a stage."""

    data: Data | None


class SamplePlan(TypedDict, total=False):
    """Of a recipe's `prompts`."""

    source: str
    column: str | None


class Recipe(Stage, total=False):
    """Of a whole recipe; runs from Python say what their teacher is made of, and no names of files."""

    warm_start: Stage | None
    prompts: SamplePlan
    teacher: str | dict[str, Any]


class Record(TypedDict, total=False):
    """Of `run.json`."""

    recipe: Recipe


def recipe_of(run: Path) -> Recipe:
    """What the recipe of a run said; empty where the folder is none. Raises ReadError where it holds something else."""
    record = run / "run.json"
    if not record.is_file():
        return {}
    with reading(record, f"delete {record}"):
        found: Record = typed(Record, object_in(record))
    return found.get("recipe", {})


def real_of(run: Path) -> str | None:
    """The real pictures that a run's recipe names, if it is a run and does."""
    recipe = recipe_of(run)
    stages: list[Stage] = [recipe, recipe.get("warm_start") or {}]
    named = [(stage.get("data") or {}).get("real") for stage in stages]
    return next((real for real in named if real), None)


def asked_of(teacher: Backbone, run: Path, prompts: Sequence[str] | None, rules: "PictureProtocol") -> tuple[str, ...]:
    """What a teacher's pictures are asked for: its classes, else some of these `prompts`, else of the run's. Raises ValueError where there are none."""
    from ..evaluation.pictures import chosen

    if isinstance(teacher, PixelModel):
        return teacher.labels
    if prompts is not None:
        return chosen(rules, prompts)
    recipe = recipe_of(run)
    named = recipe.get("teacher")
    if not isinstance(named, str):
        raise ValueError(
            f"--prompts: there is no run around {run} that says what {teacher.name} was asked for; pass a prompt file"
        )
    told: SamplePlan = recipe.get("prompts", {})
    try:
        return chosen(rules, prompts_from(str(told.get("source", "bundled")), told.get("column"), named))
    except ValueError as error:
        raise ValueError(f"{error}; or pass --prompts FILE to evaluate") from error


def evaluate_student(
    folder: Path, protocol: str | None, cache: Path, real: str | None = None, prompts: Sequence[str] | None = None
) -> dict[str, Any]:
    """The `rows_of` a student under a named protocol, or that of its teacher's kind; also `folder/eval.json`.

    `prompts` are what a model that is asked in words, and not for emoji, is measured by; by default those of the run around `folder`.
    """
    from ..evaluation.pictures import (
        PictureProtocol,
        evaluate_pictures,
    )  # seconds to import, and not every run evaluates
    from ..evaluation.protocols import evaluate

    student = open_student(folder)
    teacher = backbone_of(student)
    rules, seen = measuring(teacher, protocol, real)
    asked = asked_of(teacher, folder.parent, prompts, rules) if isinstance(rules, PictureProtocol) else ()
    rows = rows_of(student)
    each, calls = rules.total(1), [row.nfe for row in rows]
    with meter("evaluating, network calls", each * sum(calls)) as bar:

        def tell(done: int) -> None:  # a teacher's picture takes as long as dozens of a student's
            row, drawn = divmod(done, each)
            bar.advance(each * sum(calls[:row]) + drawn * sum(calls[row : row + 1]), {})

        if isinstance(rules, PictureProtocol):
            measured = evaluate_pictures(rows, rules, asked, seen, cache, tell)
        else:
            measured = evaluate(rows, rules, cache, tell)
    result = {**measured, "guidance": asdict(student.card.guidance)}
    write_json(folder / "eval.json", result)
    return result


def measuring(
    teacher: Backbone, name: str | None, real: str | None, option: str = "--protocol"
) -> "tuple[EmojiProtocol | PictureProtocol, Tensor | None]":
    """The protocol of this name or size, or the one for this kind of teacher, and the real pictures that it is to meet, as bytes.

    Raises ValueError where they do not go together, and for a teacher that draws no pictures.
    """
    from ..evaluation.pictures import PictureProtocol

    if not teacher.image_size:
        raise ValueError(
            f"{option}: {teacher.name} draws no single pictures, and nothing else is measured yet; leave it out, and look at the run's samples/ and report"
        )
    emoji = draws_emoji(teacher)
    own: dict[str, EmojiProtocol | PictureProtocol] = {p.name: p for p in protocols_of(emoji)}
    by_size = dict(zip(SIZES, own, strict=False))
    usual = "full" if emoji else "medium" if isinstance(teacher, PixelModel) else "quick"  # others may be large
    rules = protocol_named(by_size.get(name or usual, name or list(own)[-1]))
    if isinstance(rules, PictureProtocol) == emoji:
        kind = (
            "draws emoji"
            if emoji
            else "is a pixel model"
            if isinstance(teacher, PixelModel)
            else "knows no emoji by name"
        )
        raise ValueError(
            f"{option}: got {rules.name}, {teacher.name} {kind}; choose one of {', '.join(own)}{'' if emoji else f', {ANY}'}"
        )
    if real is None:
        return rules, None
    try:
        if not isinstance(rules, PictureProtocol):
            raise ValueError(f"got {real}, protocol {rules.name} has real pictures of its own; leave it out")
        return rules, real_pictures(real, teacher, rules)
    except ValueError as error:
        raise ValueError(f"{'--real' if option == '--protocol' else 'data.real'}: {error}") from error


def draws_emoji(teacher: Backbone) -> bool:
    """Whether a model is asked for emoji by their names: the bundled one, and all that have its vocabulary, as its fine-tunes do."""
    return (
        isinstance(teacher, StableDiffusion)
        and teacher.pipe.tokenizer.get_vocab() == load_tokenizer(BUNDLED / "emoji" / "tokenizer").get_vocab()
    )


def protocols_of(emoji: bool) -> "Sequence[EmojiProtocol | PictureProtocol]":
    """Those for one kind of teacher, from the smallest to the largest."""
    from ..evaluation.pictures import PICTURES
    from ..evaluation.protocols import PROTOCOLS

    return PROTOCOLS if emoji else PICTURES


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
    size = teacher.image_size
    if images.shape[2:] != (size, size):
        got = "x".join(map(str, images.shape[2:]))
        raise ValueError(
            f"the pictures of {real} are {got}, {teacher.name} draws {size}x{size}; scale them as it has seen them"
        )
    return images


def rows_of(student: Student) -> "list[Row]":
    """Teacher@50, then for every K served teacher@K guided and unguided, all that the teacher draws at the student's cost, student@K.

    At a student's cost of c network calls the teacher takes c unguided steps, or half as many guided ones: which is better is not known
    before. Of a teacher that was not guided, or has nothing to be guided by, the two are one.
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


def protocol_named(name: str) -> "EmojiProtocol | PictureProtocol":
    """Of all there are. Raises ValueError with their names."""
    from ..evaluation.pictures import pictures_named

    known = {p.name: p for emoji in (True, False) for p in protocols_of(emoji)}
    if (found := known.get(name) or pictures_named(name)) is None:
        raise ValueError(
            f"protocol: got {name!r}; choose one of {', '.join(known)}, {ANY}, or a size: {', '.join(SIZES)}"
        )
    return found


def check_measures(recipe: DistillRecipe, teacher: Backbone | None = None) -> None:
    """Raises ValueError for what cannot be measured, before anything is trained: of the names alone, and of the `teacher` when it is there.

    A recipe that says only a size is for teachers of every kind: where such a one cannot be measured along the way, that is said.
    """
    from ..evaluation.pictures import PictureProtocol

    for option, name in (("evaluate", recipe.evaluate), ("preview.protocol", recipe.preview.protocol)):
        if name is None:
            continue
        if teacher is None:
            if name not in SIZES:
                protocol_named(name)
            continue
        rules, seen = measuring(teacher, name, recipe.real, option)
        if option == "preview.protocol" and seen is None and isinstance(rules, PictureProtocol):
            if name not in SIZES:
                raise ValueError(
                    f"preview.protocol: got {name}, which needs real pictures here; set data.real, or leave it out"
                )
            console.print(
                f"preview.protocol: {teacher.name} is not measured along the way, which takes real pictures (data.real)",
                markup=False,
            )


def measure_step(step: Step, protocol: str, real: str | None = None, prompts: Sequence[str] = ("",)) -> dict[str, Any]:
    """The averaged student of a running distillation, without the teacher beside it: what a quality curve needs.

    Empty where it could only be compared with its teacher.
    """
    from ..evaluation.metrics import METRICS
    from ..evaluation.pictures import PictureProtocol, evaluate_pictures
    from ..evaluation.protocols import Row, evaluate

    count = step.method.counts[0]
    nfe = total_nfe(count, analytic=step.method.analytic_first_step)
    rows, teacher = [Row("student", count, Guidance(), nfe, _sampler(step, count, Guidance()))], backbone_of(step)
    rules, seen = measuring(teacher, protocol, real)
    if not isinstance(rules, PictureProtocol):
        found = evaluate(rows, rules)
    elif seen is None:
        return {}
    else:
        found = evaluate_pictures(rows, rules, asked_of(teacher, Path(), prompts, rules), seen)
    return {k: v for k, v in found["rows"][0].items() if k in METRICS and METRICS[k].curve}


def _sampler(
    model: Backbone | Student | Step, steps: int, guidance: Guidance
) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return sample(model, list(prompts), list(seeds), steps=steps, guidance=guidance)

    return draw


def print_table(result: dict[str, Any]) -> None:
    """The rows as a person reads them, and what is measured in how many pictures; columns that no row fills are left out."""
    from ..evaluation.metrics import METRICS

    columns = ("model", "steps", "guidance", "nfe", *(m.key for m in METRICS.values() if m.printed))
    names = [n for n in columns if any(row.get(n) is not None for row in result["rows"])]
    console.print("  ".join(f"{n[:10]:>10}" for n in names))
    for row in result["rows"]:
        console.print(
            "  ".join(f"{row[n]:>10.3f}" if isinstance(row.get(n), float) else f"{row.get(n)!s:>10}" for n in names)
        )
    console.print(f"{result['protocol']}: {result['distance']}; {result['rows'][0]['n']} pictures a row")
