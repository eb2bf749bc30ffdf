"""`fewstep evaluate`: a student next to its teacher under a protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from ..atomic import write_json
from ..backbones.base import Backbone, nfe_per_step
from ..backbones.load import BUNDLED, quiet
from ..backbones.miniature import load_tokenizer
from ..backbones.parts import DiffusersBackbone
from ..backbones.sd import StableDiffusion
from ..backbones.unconditional import PixelModel
from ..core.guidance import Guidance
from ..core.solvers import total_nfe
from ..data.prompts import Split, find_prompts, split_prompts_of
from ..evaluation.scorer import NO_EXTRA, Extra, spelled
from ..reading import object_in, reading
from ..runs.recipe import DistillRecipe
from ..runs.sampling import backbone_of, decoded, sample_trajectory
from ..student.card import card_nfe
from ..student.folder import require_folder
from ..student.student import Student
from ..training.loop import Step
from ..typed import typed
from ..zoo.pixel_data import read_pixel_data
from .extra import ending, extra_of
from .preflight import require_output
from .progress import console, meter
from .prompts import prompts_from
from .rivals import rival_rows
from .sample import open_student

if TYPE_CHECKING:
    from ..evaluation.images import ImageProtocol
    from ..evaluation.measure import Sampler
    from ..evaluation.plan import EmojiProtocol
    from ..evaluation.prompt_lists import PromptList
    from ..evaluation.protocols import Row

TEACHER_STEPS = 50
SIZES = ("quick", "medium", "full")  # of the protocols for the teacher's kind
ANY = "images-N (of N images)"


@dataclass(frozen=True)
class More:
    """Metrics of other packages, and rivals, that an evaluation adds."""

    metrics: tuple[str, ...] = ()
    reference: Path | None = None
    against: tuple[str, ...] = ()


NO_MORE = More()


def run_evaluate(
    source: str,
    protocol: str | None,
    real: str | None,
    prompts: str | None,
    out: Path | None,
    more: More = NO_MORE,
) -> None:
    """Evaluate a student, write JSON and print the table.

    By default `real` and `prompts` are those of the run's recipe.
    """
    quiet()
    if out is not None:
        require_output(out, "-o")
    folder = require_folder(source, "student")
    asked = None if prompts is None else prompts_in(prompts, protocol)
    cache = folder / EVALUATION
    result = evaluate_student(folder, protocol, cache, real or real_of(folder.parent), asked, more=more)
    path = out or folder / "eval.json"
    write_json(path, result)
    print_table(result)
    console.print(str(path.resolve()))


EVALUATION = "evaluation"  # the folder of measurements, in a run or beside a student


def prompts_in(source: str, protocol: str | None) -> list[str]:
    """Read the prompts of a file.

    COCO's own file of captions is read for the protocols of COCO. Raises ValueError.
    """
    if not (protocol or "").startswith("coco") or Path(source).suffix != ".json":
        return find_prompts(source)[0]
    with reading(f"--prompts {source}:", "pass captions_val2014.json of COCO"):
        captions = sorted(object_in(Path(source))["annotations"], key=lambda a: int(a["id"]))
        first: dict[int, str] = {}
        for one in captions:
            first.setdefault(int(one["image_id"]), str(one["caption"]).strip())
    return list(dict.fromkeys(first.values()))


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
    held_out: float


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


@dataclass(frozen=True)
class Asked:
    """The prompts of an evaluation, and where they come from, in words."""

    prompts: tuple[str, ...]
    source: str


def asked_of(
    teacher: Backbone,
    run: Path,
    given: Sequence[str] | None,
    rules: "ImageProtocol",
    split: Split | None = None,
) -> Asked:
    """Return the prompts that a teacher is evaluated with.

    A pixel model has classes for prompts, and some protocols have a list of their own. Any other teacher takes some
    of `given`, by default of the run's prompts, which are those of `split` where it is known: of those that were kept
    out of the training, where there are some. Raises ValueError where there are none.
    """
    from ..evaluation.images import chosen

    if isinstance(teacher, PixelModel):
        return Asked(teacher.labels, "the model's classes" if teacher.labels else "the model takes none")
    if rules.prompts is not None:
        prompts = listed_prompts(rules.prompts, given)
        return Asked(
            prompts if rules.count >= len(prompts) else chosen(rules, prompts), f"the list {rules.prompts.name}"
        )
    if given is not None:
        return Asked(chosen(rules, given), "passed")
    return _asked_of_run(own_split(teacher, run) if split is None else split, rules)


def own_split(teacher: Backbone, run: Path) -> Split:
    """Return the prompts of a run, trained with and kept out.

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
        found = prompts_from(str(told.get("source", "bundled")), told.get("column"), named)
    except ValueError as error:
        raise ValueError(f"{error}; or pass --prompts FILE to evaluate") from error
    return split_prompts(teacher, found, told.get("held_out", 0.0))


def _asked_of_run(split: Split, rules: "ImageProtocol") -> Asked:
    """Return some of a run's prompts: held-out ones, where there are some."""
    from ..evaluation.images import chosen

    if split.held_out:
        return Asked(chosen(rules, split.held_out), "kept out of the training")
    return Asked(chosen(rules, split.trained), "trained on: there were too few to keep some out")


def listed_prompts(known: "PromptList", given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the prompts of a published list.

    A list that does not ship is `given`, or a data set of the hub. Raises ValueError.
    """
    from ..evaluation.prompt_lists import checked, fetched_prompts, shipped_prompts

    if given is not None:
        return checked(known, given)
    if known.shipped:
        return shipped_prompts(known)
    cure = f"pass --prompts FILE with its {known.count:,} prompts: {known.source}"
    if not known.hub:
        raise ValueError(f"prompts: the list {known.name} does not ship; {cure}")
    try:
        return fetched_prompts(known) if known.files else checked(known, find_prompts(known.hub)[0])
    except ValueError as error:
        raise ValueError(f"prompts: the list {known.name} ships with no package ({error}); {cure}") from error


def evaluate_student(
    folder: Path,
    protocol: str | None,
    cache: Path,
    real: str | None = None,
    prompts: Sequence[str] | None = None,
    split: Split | None = None,
    more: More = NO_MORE,
) -> dict[str, Any]:
    """Evaluate a student under a protocol and write `folder/eval.json`.

    The rows are those of `rows_of`. Without a name, the protocol is that of the teacher's kind. `prompts`
    are for text-to-image models other than emoji models; by default the prompts are those of the run around
    `folder`, or those of `split`.
    """
    # These imports take seconds, and not every run evaluates.
    from ..evaluation.images import ImageProtocol, evaluate_images
    from ..evaluation.protocols import evaluate

    student = open_student(folder)
    teacher = backbone_of(student)
    rules, seen = measuring(teacher, protocol, real)
    asked = Asked((), "the emoji's names")
    if isinstance(rules, ImageProtocol):
        asked = asked_of(teacher, folder.parent, prompts, rules, split)
    extra = extra_of(more.metrics, more.reference)
    rows = [*rows_of(student), *rival_rows(teacher, more.against)]
    each, calls = rules.total(1), [row.nfe for row in rows]
    with meter("evaluating, NFE", each * sum(calls)) as bar, ending(extra):

        def tell(done: int) -> None:  # a teacher's image takes as long as dozens of a student's
            row, drawn = divmod(done, each)
            bar.advance(each * sum(calls[:row]) + drawn * sum(calls[row : row + 1]), {})

        if isinstance(rules, ImageProtocol):
            measured = evaluate_images(rows, rules, asked.prompts, seen, cache, tell, extra)
        else:
            measured = evaluate(rows, rules, cache, tell, extra=extra)
    result = {
        **measured,
        "guidance": asdict(student.card.guidance),
        "prompts": {"count": len(asked.prompts), "source": asked.source},
        "image": {"size": teacher.image_size, "format": "8 bits a channel, as in a PNG file"},
    }
    write_json(folder / "eval.json", result)
    return result


def measuring(
    teacher: Backbone, name: str | None, real: str | None, option: str = "--protocol"
) -> "tuple[EmojiProtocol | ImageProtocol, Tensor | None]":
    """Return the protocol for a teacher, and the real images.

    `name` is the name or the size of a protocol; None stands for the protocol of the teacher's kind. The
    real images are bytes `[N, C, H, W]`, None where `real` is None.

    Raises ValueError where protocol, teacher and real images do not go together, and for a teacher that
    samples neither images nor videos.
    """
    from ..evaluation.images import ImageProtocol

    if not teacher.image_size and not isinstance(teacher, DiffusersBackbone):
        raise ValueError(
            f"{option}: {teacher.name} samples no images; leave it out, and call fewstep.evaluate in Python"
        )
    emoji = draws_emoji(teacher)
    own: dict[str, EmojiProtocol | ImageProtocol] = {p.name: p for p in protocols_of(emoji)}
    by_size = dict(zip(SIZES, own, strict=False))
    usual = "full" if emoji else "quick"  # others may be large
    rules = protocol_named(by_size.get(name or usual, name or list(own)[-1]))
    wrong = isinstance(rules, ImageProtocol) == emoji
    if not wrong and isinstance(rules, ImageProtocol) and rules.prompts is not None:
        wrong = isinstance(teacher, PixelModel)
    if wrong:
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
    if isinstance(rules, ImageProtocol) and not teacher.image_size:
        rules = replace(rules, batch=1)  # one video at a time
    if real is None:
        return rules, None
    try:
        if not isinstance(rules, ImageProtocol) or not teacher.image_size:
            why = f"protocol {rules.name} has real images of its own" if emoji else f"{teacher.name} makes videos"
            raise ValueError(f"got {real}, {why}; leave it out")
        return rules, real_images(real, teacher, rules)
    except ValueError as error:
        raise ValueError(f"{'--real' if option == '--protocol' else 'data.real'}: {error}") from error


def split_prompts(teacher: Backbone, prompts: Sequence[str], share: float) -> Split:
    """Keep a share of prompts out of the training, for evaluation.

    A model of classes is asked for all of them, and the models of emoji have held-out prompts of their own.
    """
    if isinstance(teacher, PixelModel) or draws_emoji(teacher):
        return Split(tuple(prompts), ())
    return split_prompts_of(prompts, share)


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
    from ..evaluation.images import IMAGES, LISTED, OWN
    from ..evaluation.protocols import PROTOCOLS

    return PROTOCOLS if emoji else (*OWN, IMAGES[-1], *IMAGES[:-1], *LISTED)


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

    Without `teacher`, the names alone are checked. Raises ValueError.
    """
    for option, name in (("evaluate", recipe.evaluate), ("preview.protocol", recipe.preview.protocol)):
        if name is None:
            continue
        if teacher is None:
            if name not in SIZES:
                protocol_named(name)
            continue
        measuring(teacher, name, recipe.real, option)
    check_curves(recipe)


def check_curves(recipe: DistillRecipe) -> None:
    """Check the numbers that previews measure, and which decides.

    Raises ValueError.
    """
    if recipe.preview.protocol is None and not recipe.preview.metrics and recipe.preview.best_by is None:
        return
    from ..evaluation.metrics import METRICS, OTHERS

    curves = [key for key, metric in METRICS.items() if metric.curve and metric.better is not None]
    asked, others, best = spelled(recipe.preview.metrics), {metric.key for metric in OTHERS}, recipe.preview.best_by
    for option, given in (("metrics", recipe.preview.metrics), ("best_by", best)):
        if given and recipe.preview.protocol is None:
            raise ValueError(f"preview.{option}: is a number of a protocol; set preview.protocol, such as own-quick")
    if odd := [key for key in asked if key not in curves or key not in others]:
        known = ", ".join(key for key in curves if key in others)
        raise ValueError(f"preview.metrics: got {odd[0]}; choose from {known}")
    if best is not None and best not in curves:
        raise ValueError(f"preview.best_by: got {best}; choose one of {', '.join(curves)}")
    if best in others and not {*spelled([best])} <= {*asked}:
        raise ValueError(f"preview.best_by: got {best}, which is not measured; set preview.metrics=[{best}] too")


@dataclass(frozen=True)
class Measures:
    """What previews are measured with: a run's prompts, and networks of others."""

    split: Split
    extra: Extra = NO_EXTRA


NOTHING = Measures(Split((), ()))


def measure_step(
    step: Step, protocol: str, real: str | None = None, asked: Measures = NOTHING, cache: Path | None = None
) -> dict[str, Any]:
    """Measure the averaged student of a running distillation.

    The numbers are those of a quality curve, each with the ends of its interval. Without a reference the student is
    compared with the teacher's images, which are measured once and kept in `cache`.
    """
    from ..evaluation.images import ImageProtocol, evaluate_images
    from ..evaluation.metrics import METRICS
    from ..evaluation.protocols import Row, evaluate

    count, teacher = step.method.counts[0], backbone_of(step)
    nfe = total_nfe(count, analytic=step.method.analytic_first_step)
    rows = [Row("student", count, Guidance(), nfe, _sampler(step, count, Guidance()), lasting=False)]
    rules, seen = measuring(teacher, protocol, real)
    if not isinstance(rules, ImageProtocol):
        found = evaluate(rows, rules, extra=asked.extra)
    else:
        prompts = asked_of(teacher, Path(), None, rules, asked.split).prompts
        if seen is None:
            null = teacher.encode([""])
            best = step.method.guidance if null else Guidance()
            cost = total_nfe(TEACHER_STEPS, nfe_per_step(null, best))
            rows = [Row("teacher", TEACHER_STEPS, best, cost, _sampler(teacher, TEACHER_STEPS, best)), *rows]
        found = evaluate_images(rows, rules, prompts, seen, cache, extra=asked.extra)
    row = found["rows"][-1]
    values = {k: row[k] for k, metric in METRICS.items() if metric.curve and row.get(k) is not None}
    ends = {f"{k}_{end}": row["intervals"][k][i] for k in values if k in row["intervals"] for i, end in enumerate(ENDS)}
    return values | ends


ENDS = ("low", "high")  # of an interval


def _sampler(model: Backbone | Student | Step, steps: int, guidance: Guidance) -> "Sampler":
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        states = sample_trajectory(model, list(prompts), list(seeds), steps=steps, guidance=guidance)
        return decoded(model, states[-1].x), states[-1].x

    return draw


def print_table(result: dict[str, Any]) -> None:
    """Print the numbers with their intervals, a line for each metric.

    Metrics that no row has are left out. Below stand paired comparisons, what was found, the distance and the
    number of images.
    """
    from ..evaluation.metrics import METRICS

    rows, paired = result["rows"], result.get("paired", ())
    heads = ["", *(f"{row['model']}@{row['steps']}" for row in rows)]
    lines = [heads] + [[key, *(_cell(row, key) for row in rows)] for key in ("guidance", "nfe")]
    for metric in METRICS.values():
        if metric.printed and any(row.get(metric.key) is not None for row in rows):
            lines.append([metric.key, *(_cell(row, metric.key) for row in rows)])
    wide = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        cells = [f"{line[0]:<{wide[0]}}", *(f"{cell:>{w}}" for cell, w in zip(line[1:], wide[1:], strict=True))]
        console.print("  ".join(cells), markup=False)
    for one in paired:
        own, other = (rows[one[k]] for k in ("row", "against"))
        low, high = one["wins_interval"]
        console.print(
            f"{called(own)} beats {called(other)} in {one['metric']} at {100 * one['wins']:.0f} % of the images "
            f"({100 * low:.0f} to {100 * high:.0f} %)",
            markup=False,
        )
    for found in result.get("findings", ()):
        console.print(f"found: {found['said']}", markup=False)
    console.print(f"{result['protocol']}: {result['distance']}; {rows[0]['n']} images a row")
    if "prompts" in result:
        console.print(f"prompts: {result['prompts']['count']}, {result['prompts']['source']}", markup=False)


def called(row: Mapping[str, Any]) -> str:
    """Return a row's name in a sentence, `student@4 (4 NFE)`."""
    return f"{row['model']}@{row['steps']} ({row['nfe']} NFE)"


def _cell(row: Mapping[str, Any], key: str) -> str:
    value, ends = row.get(key), row.get("intervals", {}).get(key)
    if value is None:
        return "-"
    text = f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}"
    return text if ends is None else f"{text} [{ends[0]:.3g}, {ends[1]:.3g}]"
