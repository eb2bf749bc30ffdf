"""The tab of new trainings: teacher, recipe, prompts, memory, settings, start."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ..backbones.base import takes_prompts
from ..backbones.conformance import distilled_already
from ..backbones.load import bundled
from ..backbones.meta import meta_teacher
from ..backbones.parts import DiffusersBackbone
from ..backbones.reading import readings
from ..data.prompt_lengths import said_of_prompts
from ..data.prompts import find_prompts
from ..names import made_name, require_name
from ..runs.recipe import DistillRecipe, read_recipe
from ..training.saving import free_memory
from . import words
from .commands import program, shown, stream
from .folders import record_of, shown_name, stage_of
from .place import Place
from .queue import Job
from .settings import (
    MAIN,
    Order,
    Wish,
    about_recipe,
    fitting,
    main_settings,
    order_of,
    prompts_file,
    recipes,
    settings_of,
    verdict,
)

FIRST = "demo"  # the recipe that is shown first
TEACHERS = (
    "One that ships with fewstep, a diffusers folder, a hub id, or a checkpoint (FILE.safetensors). "
    "Empty: the recipe's."
)


@dataclass(frozen=True)
class NewTab:
    """What the other tabs need of this one."""

    recipe: gr.Dropdown
    teacher: gr.Dropdown
    name: gr.Textbox
    more: gr.Textbox
    source: gr.Textbox
    about: gr.HTML
    boxes: list[gr.Textbox]
    started: gr.State


def card_memory() -> str:
    """Return the memory of this machine's card.

    The machine's own free memory where there is no card.
    """
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_properties(0).total_memory // 2**30}GiB"
    return f"{free_memory() // 2**30}GiB"


def free_name(folder: Path, wished: str) -> str:
    """Return a name of which there is no run yet.

    `mine`, `mine-2`, ...
    """
    plain = made_name(wished)
    tries = (plain if n == 1 else f"{plain}-{n}" for n in range(1, 10_000))
    return next(name for name in tries if not (folder / name).exists())


def about_teacher(teacher: str) -> tuple[list[tuple[str, object]], list[str]]:
    """Return what a teacher is, without its weights, and warnings.

    Raises ValueError where it is none.
    """
    found = meta_teacher(teacher)
    count = sum(p.numel() for p in found.module.parameters())
    told: list[tuple[str, object]] = [
        ("Network", f"{type(found.module).__name__}, {count / 1e6:,.1f} M weights"),
        ("State", " x ".join(map(str, found.shape))),
        ("Prompts", "takes prompts" if takes_prompts(found) else "takes none"),
    ]
    noted = distilled_already(found.pipe, teacher) if isinstance(found, DiffusersBackbone) else ""
    return told, [noted] if noted else []


def about_prompts(source: str, teacher: str) -> list[str]:
    """Return what prompts are: count, duplicates, length in tokens, share too long.

    Raises ValueError where there are none.
    """
    prompts, found = find_prompts(source)
    said = [found.line, f"first: {prompts[0]}"]
    backbone = meta_teacher(teacher)
    if not takes_prompts(backbone):
        return [*said, "this teacher takes no prompts; they are not used"]
    for one in readings(backbone, prompts):
        lengths, cut = sorted(one.lengths), sum(n > one.most for n in one.lengths)
        said.append(
            f"{one.encoder}: {lengths[len(lengths) // 2]} tokens in the middle, {lengths[-1]} at most, of {one.most}; "
            f"{100 * cut / len(lengths):.1f} % are too long"
        )
    return said + said_of_prompts(backbone, prompts)


def taken(record: Any) -> tuple[str, str, str, list[str]]:
    """Return (recipe, teacher, prompts, settings) of a run."""
    given = [str(item) for item in record.get("overrides") or []]
    named = {item.partition("=")[0]: item.partition("=")[2] for item in given}
    own = [item for item in given if item.partition("=")[0] not in ("teacher", "prompts.source")]
    return str(record.get("recipe_source", FIRST)), named.get("teacher", ""), named.get("prompts.source", ""), own


def build(place: Place) -> NewTab:
    """Build the tab."""
    folder, first = place.folder, main_settings(FIRST)
    known = {s.key: s for s in settings_of(read_recipe(FIRST, [], DistillRecipe))}
    with gr.Row():
        with gr.Column(min_width=280):
            recipe = gr.Dropdown(
                recipes(), value=FIRST, label="Recipe", allow_custom_value=True, elem_id="recipe",
                info="A shipped one, or the path of a YAML file.",
            )  # fmt: skip
            about = gr.HTML(words.lines("\n".join(about_recipe(FIRST))), elem_id="about-recipe")
        with gr.Column(min_width=280):
            teacher = gr.Dropdown(
                bundled(), value="", label="Teacher", allow_custom_value=True, info=TEACHERS, elem_id="teacher"
            )
            name = gr.Textbox(free_name(folder, FIRST), label="Name", info="Folder of the run.", elem_id="name")
            teacher_facts = gr.HTML(elem_id="about-teacher")
            with gr.Row():
                what = gr.Button("What is this teacher?", size="sm", elem_id="what-teacher")
                examine = gr.Button("Check it (loads it)", size="sm", elem_id="check-teacher")
    with gr.Accordion("Prompts", open=False):
        gr.HTML(words.note("Without any the recipe's own are taken. Pasted prompts count over a file."))
        pasted = gr.Textbox("", label="Paste prompts, one a line", lines=4, max_lines=12, elem_id="pasted")
        with gr.Row():
            source = gr.Textbox(
                "", label="Or a file or a hub data set", info=".txt, .jsonl, .csv, .tsv, or owner/name."
            )
            upload = gr.File(
                label="Or drop a file", file_types=[".txt", ".jsonl", ".csv", ".tsv"], type="filepath", height=150
            )
        look = gr.Button("Look at the prompts", size="sm", elem_id="look-prompts")
        prompt_facts = gr.HTML(elem_id="about-prompts")
    with gr.Accordion("Settings", open=True):
        boxes = []
        for start in range(0, len(MAIN), 3):
            with gr.Row():
                for key in MAIN[start : start + 3]:
                    boxes.append(
                        gr.Textbox(
                            first[key],
                            label=key,
                            info=known[key].text if key in known else "",
                            min_width=200,
                            elem_id=f"set-{key.replace('.', '-')}",
                        )
                    )
        with gr.Row():
            setting = gr.Dropdown(list(known), label="Any other setting", value=None, min_width=240)
            value = gr.Textbox("", label="Its value", min_width=160)
            add = gr.Button("Set it", size="md", min_width=90, elem_classes="fs-low", elem_id="set-it")
        setting_facts = gr.HTML(elem_id="about-setting")
        more = gr.Textbox(
            "", label="More settings, one a line", lines=2, max_lines=16, placeholder="train.ema=0.99", elem_id="more",
            info="As --set takes them. They count over the fields above.",
        )  # fmt: skip
    with gr.Accordion("Memory", open=False):
        with gr.Row():
            memory = gr.Textbox(
                card_memory(),
                label="Memory of the card",
                info="Of this machine where it has no card.",
                elem_id="memory",
            )
            count = gr.Button("Does it fit?", elem_id="plan", elem_classes="fs-low")
        fits = gr.HTML(elem_id="fits")
        use = gr.Button("Take the settings that fit", size="sm", visible=False, elem_id="take-fitting")
        found = gr.State([])
    with gr.Row():
        start = gr.Button("Start", variant="primary", elem_id="start")
        dry = gr.Button("Dry run", elem_id="dry")
    said = gr.HTML(elem_id="said")
    output = gr.HTML(elem_id="output")
    started = gr.State("")

    def chosen_recipe(source_: str) -> list[Any]:
        """Show another recipe's head and settings."""
        try:
            main, head = main_settings(source_), about_recipe(source_)
            keys = [s.key for s in settings_of(read_recipe(source_, [], DistillRecipe))]
        except (ValueError, OSError) as error:
            return [words.note(error, "bad"), gr.skip(), gr.skip(), *[gr.skip()] * len(MAIN)]
        wished = read_recipe(source_, [], DistillRecipe).name
        shown_head = words.lines("\n".join(head)) or words.note("This recipe says nothing of itself.")
        return [shown_head, gr.update(choices=keys, value=None), free_name(folder, wished), *(main[k] for k in MAIN)]

    def explain(recipe_: str, key: str | None) -> str:
        """Show what a setting is."""
        if not key:
            return ""
        try:
            one = next(s for s in settings_of(read_recipe(recipe_, [], DistillRecipe)) if s.key == key)
        except (ValueError, OSError, StopIteration):
            return words.note("This recipe has no such setting.", "warn")
        allowed = [("Allowed", one.allowed)] if one.allowed else []
        return words.note(one.text or "No text.") + words.facts([("In this recipe", one.value), *allowed])

    def added(key: str | None, text: str, lines: str) -> str:
        """Add a setting to the lines."""
        kept = [line for line in lines.splitlines() if line.strip() and line.partition("=")[0].strip() != key]
        return "\n".join([*kept, f"{key}={text.strip()}"] if key and text.strip() else kept)

    def tell_teacher(*fields: Any) -> str:
        """Say what the teacher is."""
        try:
            found, noted = about_teacher(Wish.of(fields).own_teacher)
        except (ValueError, OSError) as error:
            return words.note(error, "bad")
        return words.facts(found) + "".join(words.note(line, "warn") for line in noted)

    def check_teacher(*fields: Any) -> Iterator[str]:
        """Load the teacher and check it."""
        try:
            own = Wish.of(fields).own_teacher
        except (ValueError, OSError) as error:
            yield words.note(error, "bad")
            return
        for one in stream(["doctor", own]):
            told = "It is loaded and checked." if one.code is None else one.error or "Every check holds."
            yield words.note(told, "bad" if one.error else "") + words.lines(one.said)

    def tell_prompts(*fields: Any) -> str:
        """Count the prompts and measure their length."""
        try:
            wish = Wish.of(fields)
            file = prompts_file(wish, place.downloads / "pasted")
            if not file:
                return words.note("No prompts are given; the recipe's own are taken.")
            return words.lines("\n".join(about_prompts(file, wish.own_teacher)))
        except (ValueError, OSError) as error:
            return words.note(error, "bad")

    def ordered(wish: Wish, kept: Path) -> Order:
        """Return what is asked for.

        Dropped and pasted prompts are written beside `kept`.
        """
        return order_of(folder, wish, prompts_file(wish, kept))

    def plan(card: str | None, *fields: Any) -> Iterator[list[Any]]:
        """Count the memory and find what fits."""
        memory_ = (card or "").strip()
        try:
            command = ordered(Wish.of(fields), place.downloads / "pasted").plan(memory_)
        except (ValueError, OSError) as error:
            yield [words.note(error, "bad"), gr.update(visible=False), []]
            return
        for one in stream(command):
            sets = fitting(one.said) if one.code == 0 else []
            new = [s for s in sets if s not in command]
            told = "It is counted; no weights are loaded." if one.code is None else verdict(one.said, one.code, memory_)
            note = words.note(told, "bad" if one.code else "warn" if new else "")
            yield [note + words.lines(one.said), gr.update(visible=bool(new)), new]

    def take_fitting(sets: list[str], lines: str) -> str:
        """Set what fits."""
        keys = {s.partition("=")[0] for s in sets}
        return "\n".join([*(x for x in lines.splitlines() if x.strip() and x.partition("=")[0] not in keys), *sets])

    def rehearse(*fields: Any) -> Iterator[list[Any]]:
        """Run everything but the training."""
        try:
            order = ordered(Wish.of(fields), place.downloads / "pasted")
        except (ValueError, OSError) as error:
            yield [words.note(error, "bad"), ""]
            return
        for one in stream(order.distill(dry=True)):
            done = (
                "Everything but the training runs."
                if one.code is None
                else one.error or "Everything holds; Start trains it."
            )
            yield [words.note(done, "bad" if one.error else ""), words.lines(one.said)]

    def begin(*fields: Any) -> list[Any]:
        """Start the training, or let it wait."""
        try:
            wish = Wish.of(fields)
            run = folder / require_name(wish.name, "name")
            if run.exists() or any(job.run == str(run) for job in place.line.jobs()):
                raise ValueError(
                    f"name: {wish.name} is there already; resume it in the tab Runs, or choose another name"
                )
            folder.mkdir(parents=True, exist_ok=True)
            order = ordered(wish, run)
            other = place.line.put(Job(str(run), tuple(program(order.distill()))))
        except (ValueError, OSError) as error:
            return [words.note(error, "bad"), "", gr.skip(), gr.skip()]
        told = "It has started; the tab Runs shows it."
        if other is not None:
            told = f"It waits in the queue until {shown_name(other, folder)} has ended."
        line = words.lines(f"$ {shown(order.distill())}")
        return [words.note(told), line, str(run), free_name(folder, f"{wish.name}-2")]

    private: dict[str, Any] = {"api_visibility": "private"}
    asked = [recipe, teacher, name, pasted, source, upload, more, *boxes]
    recipe.input(chosen_recipe, recipe, [about, setting, name, *boxes], show_progress="hidden", **private)
    setting.change(explain, [recipe, setting], setting_facts, show_progress="hidden", **private)
    add.click(added, [setting, value, more], more, **private)
    again: dict[str, Any] = {**private, "trigger_mode": "always_last"}  # a press in the meantime counts afterwards
    what.click(tell_teacher, asked, teacher_facts, **again)
    examine.click(check_teacher, asked, teacher_facts, **again)
    look.click(tell_prompts, asked, prompt_facts, **again)
    count.click(plan, [memory, *asked], [fits, use, found], **again)
    use.click(take_fitting, [found, more], more, **private)
    dry.click(rehearse, asked, [said, output], **again)
    start.click(begin, asked, [said, output, started, name], **private)
    return NewTab(recipe, teacher, name, more, source, about, boxes, started)


def duplicated(place: Place, run: str | None) -> list[Any]:
    """Return the fields of a new training like a run.

    They are those of `NewTab`: recipe, teacher, prompts, more settings, name, the recipe's head, main settings.
    """
    if not run:
        return [gr.skip()] * (6 + len(MAIN))
    own = Path(run)
    recipe, teacher, prompts, lines = taken(record_of(own) or record_of(stage_of(own)))
    try:
        main, head = main_settings(recipe), words.lines("\n".join(about_recipe(recipe)))
    except (ValueError, OSError) as error:
        main, head = dict.fromkeys(MAIN, ""), words.note(error, "bad")
    name = free_name(place.folder, f"{own.name}-2")
    return [recipe, teacher, prompts, "\n".join(lines), name, head, *(main[k] for k in MAIN)]
