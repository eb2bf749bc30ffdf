"""The tab of exports: a student as files for other programs, checked."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..names import made_name
from ..reading import reading, text_in
from ..report.words import size
from ..student.card import DTYPES, StudentCard
from ..student.folder import read_card
from ..student.formats import FORMATS
from . import words
from .commands import stream
from .folders import FINAL, student_names
from .place import Place

EXPORTS = "exports"  # folder under the studio's
OWN = "the base's"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def out_of(folder: Path, student: str, form: str) -> Path:
    """Return a folder for an export that is not there yet."""
    place = Path(student)
    own = place.parent if place.name == FINAL else place
    name = made_name(f"{own.name}-{form}")
    tries = (folder / EXPORTS / (name if n == 1 else f"{name}-{n}") for n in range(1, 10_000))
    return next(path for path in tries if not path.exists())


def command(student: str, out: str, form: str, steps: str, guidance: str | None, dtype: str) -> list[str]:
    """Return the command of an export.

    Raises ValueError where nothing is chosen.
    """
    if not student:
        raise ValueError("student: got none; choose one")
    if not out.strip():
        raise ValueError("folder: got none; name a new one")
    whole = FORMATS[form].whole and dtype in DTYPES
    return [
        "export", student, out.strip(), "--format", form, *(["--steps", steps] if steps else []),
        *(["--guidance", guidance] if guidance else []), *(["--dtype", dtype] if whole else []),
    ]  # fmt: skip


def files_in(out: Path) -> list[tuple[str, str]]:
    """Return (file, its size) of what was written."""
    return [(str(p.relative_to(out)), size(p.stat().st_size)) for p in sorted(out.rglob("*")) if p.is_file()]


def snippet(out: Path, card: StudentCard) -> str:
    """Return Python code that samples from exported files, wherever it is run.

    The code is that of the folder's own page, which is read beside the folder.
    """
    try:
        with reading(out / "README.md", "export it again"):
            found = BLOCK.search(text_in(out / "README.md"))
    except ValueError:
        found = None
    if found is not None:
        return found[1].strip().replace(f'"{out.name}"', json.dumps(str(out)))
    return f"import fewstep\n\npipe = fewstep.load({card.base!r}, {str(out)!r})\nimage = pipe('a prompt').images[0]"


def build(place: Place, tab: gr.Tab) -> None:
    """Build the tab."""
    folder = place.folder
    with gr.Row():
        with gr.Column(min_width=280):
            student = gr.Dropdown(
                student_names(folder), value=None, label="Student", allow_custom_value=True, elem_id="export-student"
            )
            form = gr.Radio(
                [(f"{name}: {known.text}", name) for name, known in FORMATS.items()], value="student", label="Format",
                elem_classes="fs-runs", elem_id="format",
            )  # fmt: skip
        with gr.Column(min_width=280):
            with gr.Row():
                steps = gr.Dropdown([], label="Steps", min_width=110, info="Files serve one count.")
                guidance = gr.Dropdown([], label="Guidance", visible=False, min_width=110)
                dtype = gr.Dropdown([OWN, *DTYPES], value=OWN, label="Type of whole networks", min_width=150)
            out = gr.Textbox("", label="Folder", info="A new one.", elem_id="export-folder")
            go = gr.Button("Export and check", variant="primary", elem_id="export-go")
    said = gr.HTML(words.note("Every file is loaded again and compared with the student before it counts as written."),
                   elem_id="export-said")  # fmt: skip
    output = gr.HTML(elem_id="export-output")
    files = gr.HTML(elem_id="export-files")
    code = gr.Code(
        label="Use it from Python", language="python", interactive=False, visible=False, lines=3,
        show_line_numbers=False, wrap_lines=True, elem_id="snippet",
    )  # fmt: skip

    def choose(own: str | None, wished: str) -> list[Any]:
        """Show what the student can be written as."""
        if not own:
            return [gr.skip()] * 3
        try:
            card = read_card(Path(own))
        except (ValueError, OSError):
            return [gr.update(choices=[]), gr.update(visible=False), gr.skip()]
        counts, scales = [str(k) for k in card.steps], [f"{w:g}" for w in card.guidance_scales]
        return [
            gr.update(choices=counts, value=counts[0]),
            gr.update(choices=scales, value=scales[0] if scales else None, visible=bool(scales)),
            str(out_of(folder, own, wished)),
        ]

    def write(own: str | None, path: str, wished: str, count: str, scale: str | None, kind: str) -> Iterator[list[Any]]:
        """Run `fewstep export`, then show what was written."""
        hidden = gr.update(visible=False)
        try:
            for one in stream(command(own or "", path, wished, count or "", scale, kind)):
                told = words.note("It is written, loaded again and compared.") if one.code is None else ""
                yield [told, words.lines(one.said), "", hidden]
            if one.code:
                yield [words.note(one.error, "bad"), words.lines(one.said), "", hidden]
                return
            made = Path(path.strip())
            card = read_card(made)
            last = [line for line in one.said.splitlines() if "compared" in line]
            yield [
                words.note(f"{last[-1] if last else 'Compared'}. It is in {made}."),
                words.lines(one.said),
                words.table(("File", "Size"), files_in(made)),
                gr.update(value=snippet(made, card), visible=True),
            ]
        except (ValueError, OSError) as error:
            yield [words.note(error, "bad"), "", "", hidden]

    def listed(own: str | None) -> Any:
        """List the students of this moment."""
        found = student_names(folder)
        return gr.update(choices=found, value=own if own else found[0][1] if found else None)

    private: dict[str, Any] = {"api_visibility": "private"}
    tab.select(listed, student, student, show_progress="hidden", **private)
    student.change(choose, [student, form], [steps, guidance, out], show_progress="hidden", **private)
    form.change(choose, [student, form], [steps, guidance, out], show_progress="hidden", **private)
    go.click(write, [student, out, form, steps, guidance, dtype], [said, output, files, code], **private)
