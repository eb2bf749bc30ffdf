"""The tab of samples.

A student beside its teacher, from the same noise.
"""

import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from .. import __version__
from ..atomic import write_bytes
from ..backbones.base import Backbone, nfe_per_step, takes_prompts
from ..backbones.load import seen_from
from ..backbones.unconditional import PixelModel
from ..core.guidance import Guidance
from ..core.solvers import SOLVERS, total_nfe
from ..report.grids import draw_grid
from ..report.images import load_images, to_pil
from ..report.run import IMAGES
from ..report.video import strip
from ..report.words import duration, plural
from ..runs.sampling import sample
from ..student.card import StudentCard, card_nfe
from ..student.folder import card_time, read_card
from ..student.student import Student
from ..training.loop import default_device
from . import words
from .faults import PlainError, plainly
from .folders import BEST, FINAL, record_of, student_names
from .images import Settings, enlarged, settings_in, with_settings
from .place import NETWORK, Place

OWN = "the student's own"
TEACHER_STEPS = 50
MOST = 16  # images at once
BEGIN = "Images appear here: the student's beside its teacher's, from the same noise, with what they took."
EMPTY = "No student yet. A run has one in its folder final/ as soon as it has finished, and in best/ while it trains."


class Models:
    """The student that was sampled last, kept with its base."""

    def __init__(self) -> None:
        self.lock, self.key, self.student = threading.Lock(), ("", 0), None

    key: tuple[str, int]
    student: Student | None

    def read(self, folder: Path) -> tuple[Student, str]:
        """Return a student, and a note where its base has other weights.

        Raises ValueError with one line.
        """
        with self.lock:
            key = (str(folder), card_time(folder))
            if self.student is None or self.key != key:
                self.student = None  # before the next one takes memory
                base = seen_from(read_card(folder).base, folder)
                self.student, self.key = Student.read(folder, base, default_device()), key
            return self.student, self.student.base_note()

    def drop(self) -> None:
        """Forget the student, so that a training has its memory."""
        with self.lock:
            self.student, self.key = None, ("", 0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Drawn:
    """Images of one model, and what they took.

    `images` [N, 3, H, W]; clips are strips of frames. `seconds` are those of an image.
    """

    name: str
    images: Tensor
    nfe: int
    seconds: float

    @property
    def row(self) -> tuple[str, int, str]:
        """The line of the table."""
        return self.name, self.nfe, duration(self.seconds)


def prompt_for(backbone: Backbone, prompt: str) -> str:
    """Return the prompt that a model takes.

    The empty one where it takes none.

    Raises ValueError for an empty prompt of a model that takes prompts.
    """
    if not takes_prompts(backbone):
        return ""
    if not prompt.strip():
        if isinstance(backbone, PixelModel):
            raise ValueError(f"prompt: got none, this model draws {', '.join(backbone.labels)}; name one")
        raise ValueError("prompt: got none; describe the image")
    return prompt.strip()


def by_student(student: Student, asked: Settings) -> Drawn:
    """Sample with a student.

    Raises ValueError.
    """
    prompts, seeds = [prompt_for(student.backbone, asked.prompt)] * asked.count, _seeds(asked)
    scale = asked.guidance if student.card.guidance_scales else None
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of an untrained step count, which the page says
        images = sample(
            student, prompts, seeds, steps=asked.steps, guidance=1.0 if scale is None else scale,
            solver=asked.solver or None,
        )  # fmt: skip
    each = (time.perf_counter() - began) / asked.count
    name = f"student, {plural(asked.steps, 'step')}"
    return Drawn(name, strip(images), card_nfe(student.card, asked.steps), each)


def by_teacher(student: Student, asked: Settings) -> Drawn:
    """Sample with a student's teacher, guided as in its training."""
    backbone, guidance = student.backbone, student.card.guidance
    prompts, seeds = [prompt_for(backbone, asked.prompt)] * asked.count, _seeds(asked)
    null = backbone.encode([""])
    guidance = guidance if null else Guidance()
    began = time.perf_counter()
    images = sample(backbone, prompts, seeds, steps=TEACHER_STEPS, guidance=guidance)
    each = (time.perf_counter() - began) / asked.count
    told = f", guidance {guidance.scale:g}" if guidance.active else ""
    nfe = total_nfe(TEACHER_STEPS, nfe_per_step(null, guidance))
    return Drawn(f"teacher, {plural(TEACHER_STEPS, 'step')}{told}", strip(images), nfe, each)


def _seeds(asked: Settings) -> list[int]:
    return list(range(asked.seed, asked.seed + asked.count))


def conditions(student: Student) -> list[int]:
    """Return the step counts that a student can be told.

    [0] for one that is told none.
    """
    return sorted(student.card.steps) if student.vectors and not student.card.guidance_scales else [0]


def steps_grid(student: Student, asked: Settings) -> Image.Image:
    """Sample a student for every pair of its step counts.

    It is conditioned on the count of a row and sampled in that of a column (TDM, figure 10). A student without
    conditions has one row.
    """
    counts, told = sorted(student.card.steps), conditions(student)
    prompt = prompt_for(student.backbone, asked.prompt)
    scale = asked.guidance if student.card.guidance_scales and asked.guidance is not None else 1.0

    def one(condition: int, steps: int) -> Tensor:
        return strip(sample(student, [prompt], [asked.seed], steps=steps, guidance=scale, condition=condition or None))[
            0
        ]

    images = torch.stack([torch.stack([one(condition, steps) for steps in counts]) for condition in told])
    rows = [f"told {plural(n, 'step')}" if n else "student" for n in told]
    return draw_grid(images, rows, [f"sampled in {plural(n, 'step')}" for n in counts])


def settings_for(folder: str, prompt: str, seed: Any, count: Any, steps: Any, solver: str, guidance: Any) -> Settings:
    """Return the settings of the fields.

    Raises ValueError for a field without a number.
    """
    if not folder:
        raise ValueError("student: got none; choose one")
    if seed is None or count is None or steps is None:
        raise ValueError("seed, count and steps: got nothing, allowed are whole numbers")
    own = "" if solver in ("", OWN) else solver
    scale = None if guidance in (None, "") else float(guidance)
    return Settings(folder, prompt or "", int(seed), max(1, min(MOST, int(count))), int(steps), own, scale, __version__)


def own_prompts(folder: Path) -> list[str]:
    """Return prompts that a student's run shows, to begin with."""
    run = folder.parent if folder.name in (FINAL, BEST) else folder
    shown = (record_of(run).get("recipe") or {}).get("preview") or {}
    if prompts := [str(p) for p in shown.get("prompts") or [] if p]:
        return prompts
    try:
        return [p for p in load_images(run / IMAGES).prompts if p]
    except (ValueError, OSError):
        return []


def about(card: StudentCard) -> list[tuple[str, object]]:
    """Return what a student is."""
    return [
        ("Teacher", card.base),
        ("Method", card.method),
        ("Serves", ", ".join(plural(k, "step") for k in card.steps)),
        ("Guidance", ", ".join(f"{w:g}" for w in card.guidance_scales) or f"{card.guidance.scale:g}, baked in"),
        ("Iterations", f"{card.iterations:,}"),
    ]


def build(place: Place, tab: gr.Tab) -> None:
    """Build the tab."""
    models = Models()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            student = gr.Dropdown(
                student_names(place.folder), value=None, label="Student", allow_custom_value=True, elem_id="student",
                info="Of a run, its best, or an exported folder.",
            )  # fmt: skip
            facts = gr.HTML(words.note(EMPTY), elem_id="about-student")
            prompt = gr.Dropdown(
                [],
                value="",
                label="Prompt",
                allow_custom_value=True,
                elem_id="prompt",
                info="Or the class of a class model.",
            )
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, min_width=90, elem_id="seed", info="Of the first.")
                count = gr.Number(
                    1,
                    label="Images",
                    precision=0,
                    minimum=1,
                    maximum=MOST,
                    min_width=90,
                    elem_id="count",
                    info="Of seeds in a row.",
                )
            steps = gr.Slider(1, 8, 4, step=1, label="Steps", elem_id="steps")
            with gr.Row():
                solver = gr.Dropdown([OWN, *SOLVERS], value=OWN, label="Solver", min_width=140)
                guidance = gr.Dropdown(
                    [], label="Guidance", visible=False, min_width=120, info="It was trained for these."
                )
            beside = gr.Checkbox(True, label="Sample the teacher too", info=f"In {TEACHER_STEPS} guided steps.")
            with gr.Row():
                go = gr.Button("Sample", variant="primary", elem_id="go", min_width=120)
                grid = gr.Button("Steps grid", elem_id="steps-grid", min_width=120)
            free = gr.Button("Free its memory", size="sm", elem_id="free")
            dropped = gr.File(
                label="Drop an image of the studio to take its settings", file_types=[".png"], type="filepath",
                height=150, elem_id="dropped",
            )  # fmt: skip
        with gr.Column(scale=2, min_width=300):
            said = gr.HTML(words.note(BEGIN), elem_id="sample-said")
            slider = gr.ImageSlider(
                label="Teacher | student: draw the line", format="png", type="pil", interactive=False, visible=False,
                elem_classes="fs-wipe", elem_id="sample-wipe", max_height=560, buttons=["fullscreen"],
            )  # fmt: skip
            gallery = gr.Gallery(
                label="Images", format="png", columns=4, object_fit="contain", height="auto", visible=False,
                elem_id="gallery", interactive=False,
            )  # fmt: skip
            figure = gr.Image(
                label="Steps grid",
                format="png",
                type="pil",
                interactive=False,
                visible=False,
                elem_id="grid",
                buttons=["fullscreen"],
            )
            times = gr.HTML(elem_id="times")
            download = gr.DownloadButton("Download with its settings", visible=False, elem_id="download")

    def choose(folder: str | None, known: str) -> list[Any]:
        """Show what the chosen student is and serves."""
        if folder and folder == known:
            return [gr.skip()] * 5
        if not folder:
            return [words.note(EMPTY if not student_names(place.folder) else "Choose a student."), *[gr.skip()] * 3, ""]
        try:
            card = read_card(Path(folder))
        except (ValueError, OSError) as error:
            return [words.note(error, "bad"), *[gr.skip()] * 3, ""]
        prompts, most = own_prompts(Path(folder)), max(card.steps)
        scales = [f"{w:g}" for w in card.guidance_scales]
        served = f"It was trained for {', '.join(map(str, card.steps))}."
        return [
            words.facts(about(card)),
            gr.update(choices=prompts, value=prompts[0] if prompts else ""),
            gr.update(minimum=1, maximum=max(most, 2), value=card.steps[0], info=served),
            gr.update(choices=scales, value=scales[0] if scales else None, visible=bool(scales)),
            folder,
        ]

    def listed(folder: str | None) -> Any:
        """List the students of this moment."""
        found = student_names(place.folder)
        known = [value for _, value in found]
        return gr.update(choices=found, value=folder if folder else known[0] if known else None)

    nothing = [gr.update(visible=False)] * 3

    def failed(error: PlainError) -> list[Any]:
        return [words.note(error, "bad"), *nothing, "", gr.update(visible=False)]

    def draw(*fields: Any) -> Iterator[list[Any]]:
        """Sample student and teacher."""
        try:
            with plainly(place.told):
                *own, with_teacher = fields
                asked = settings_for(*own)
                yield [words.note("The student is loaded."), *nothing, "", gr.update(visible=False)]
                model, base_note = models.read(Path(asked.student))
                yield [words.note("The student samples."), *nothing, "", gr.update(visible=False)]
                drawn = [by_student(model, asked)]
                if with_teacher:
                    row = words.table(HEADS, [drawn[0].row])
                    yield [words.note("The teacher samples."), *nothing, row, gr.update(visible=False)]
                    drawn.insert(0, by_teacher(model, asked))
        except PlainError as error:
            yield failed(error)
            return
        yield finished(drawn, asked, model.card, base_note)

    def finished(drawn: list[Drawn], asked: Settings, card: StudentCard, base_note: str) -> list[Any]:
        own, known = drawn[-1].images, asked.steps in card.steps
        image = to_pil(own[0]) if asked.count == 1 else _sheet(drawn, asked)
        name = f"fewstep-{asked.seed}-{asked.steps}steps.png"
        file = write_bytes(place.downloads / name, with_settings(image, asked))
        told = "" if known else words.note(
            f"It was trained for {', '.join(map(str, card.steps))} steps, not for {asked.steps}.", "warn"
        )  # fmt: skip
        told += words.note(base_note, "warn") if base_note else ""
        images = [
            (enlarged(to_pil(x)), f"{d.name.partition(',')[0]}, seed {asked.seed + i}")
            for d in drawn
            for i, x in enumerate(d.images)
        ]
        pair = (images[0][0], images[asked.count][0]) if len(drawn) > 1 else None
        alone = len(drawn) > 1 and asked.count == 1
        return [
            told or words.note("Done."),
            gr.update(value=pair, visible=pair is not None),
            gr.update(value=images, visible=not alone, columns=min(asked.count, 4)),
            gr.update(visible=False),
            words.table(HEADS, [d.row for d in drawn]),
            gr.update(value=str(file), visible=True),
        ]

    def draw_steps(*fields: Any) -> Iterator[list[Any]]:
        """Sample the grid of step counts."""
        try:
            with plainly(place.told):
                asked = settings_for(*fields[:-1])
                yield [words.note("The grid is sampled."), *nothing, "", gr.update(visible=False)]
                model, _ = models.read(Path(asked.student))
                made = steps_grid(model, asked)
        except PlainError as error:
            yield failed(error)
            return
        file = write_bytes(place.downloads / f"fewstep-{asked.seed}-grid.png", with_settings(made, asked))
        told = "Columns: the step count that it is sampled in."
        if len(conditions(model)) > 1:
            told = f"Rows: the step count that it is told. {told}"
        yield [
            words.note(told),
            *nothing[:2],
            gr.update(value=made, visible=True),
            "",
            gr.update(value=str(file), visible=True),
        ]

    def forget() -> str:
        """Forget the student that is loaded."""
        models.drop()
        return words.note("Nothing is loaded any more; the next sample loads it again.")

    def take(path: str | None) -> list[Any]:
        """Set the fields as an image tells."""
        if path is None:
            return [gr.skip()] * 10
        try:
            told = settings_in(Path(path))
            there = Path(told.student).is_dir()
            about_it = choose(told.student, "") if there else [gr.skip()] * 5
        except (ValueError, OSError) as error:
            return [words.note(error, "bad"), *[gr.skip()] * 9]
        lacking = f"Its student {told.student} is not here; the other settings are taken."
        note = words.note("The settings are those of the image.") if there else words.note(lacking, "warn")
        scale = gr.skip() if told.guidance is None else f"{told.guidance:g}"
        own = gr.update(choices=student_names(place.folder), value=told.student) if there else gr.skip()
        fields_ = [own, told.prompt, told.seed, told.count, told.steps, told.solver or OWN, scale]
        return [note, about_it[0], *fields_, about_it[4]]

    fields = [student, prompt, seed, count, steps, solver, guidance]
    out = [said, slider, gallery, figure, times, download]
    private: dict[str, Any] = {"api_visibility": "private"}
    network: dict[str, Any] = {**private, "concurrency_id": NETWORK, "concurrency_limit": 1}
    shown_for = gr.State("")  # the student whose prompts and steps the fields show
    chosen: dict[str, Any] = {
        "fn": choose, "inputs": [student, shown_for], "outputs": [facts, prompt, steps, guidance, shown_for],
        "show_progress": "hidden", **private,
    }  # fmt: skip
    tab.select(listed, student, student, show_progress="hidden", **private).then(**chosen)
    student.input(**chosen)
    again: dict[str, Any] = {**network, "trigger_mode": "always_last"}  # a press in the meantime counts afterwards
    go.click(draw, [*fields, beside], out, **again)
    free.click(forget, None, said, **network)
    grid.click(draw_steps, [*fields, beside], out, **again)
    dropped.upload(take, dropped, [said, facts, *fields, shown_for], **private)


HEADS = ("Model", "Network calls", "An image took")


def _sheet(drawn: list[Drawn], asked: Settings) -> Image.Image:
    """Draw all images, a row for each model."""
    images = torch.stack([d.images for d in drawn])
    return draw_grid(images, [d.name for d in drawn], [f"seed {s}: {asked.prompt}" for s in _seeds(asked)])
