"""`fewstep export`: a student as files for one of its step counts."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from ..backbones.load import quiet
from ..backbones.student_scheduler import pipeline_nfe
from ..report.words import plural
from ..student.card import DTYPES, card_nfe
from ..student.folder import require_folder
from ..student.formats import FORMATS, export, name_of
from .loading import hashed
from .preflight import require_parent
from .progress import console, put_result, working
from .sample import open_student


def run_export(
    source: str,
    out: Path,
    form: str,
    steps: int | None,
    base: str | None,
    guidance: float | None = None,
    dtype: str | None = None,
) -> None:
    """Write the files, load them again, sample and compare.

    `dtype` is that of whole networks, by default the base's.
    """
    quiet()
    folder = require_folder(source, "student")
    whole = [name for name, known in FORMATS.items() if known.whole]
    if form not in FORMATS:
        raise ValueError(f"--format: got {form!r}, allowed are {', '.join(FORMATS)}")
    if os.path.lexists(out):
        raise ValueError(f"DIR: {out} is there already; choose another folder")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: got {dtype!r}, allowed are {', '.join(DTYPES)}")
    if dtype is not None and form not in whole:
        raise ValueError(
            f"--dtype: got {dtype} with --format {form}, whose LoRA stays as it was trained; "
            f"it is for {' and '.join(whole)}"
        )
    require_parent(out, "DIR")
    # The comparison needs more precision than half precision has.
    student = open_student(folder, base, torch.float32)
    card = student.card
    if base is not None:  # the files will be used with this base
        student = replace(student, card=replace(card, base=base, base_hash=hashed(student.backbone.module)))
    count = steps or card.steps[0]
    if count not in card.steps:
        raise ValueError(f"--steps: got {count}, this student serves {', '.join(map(str, card.steps))}")
    if guidance is not None and guidance not in card.guidance_scales:
        known = ", ".join(f"{w:g}" for w in card.guidance_scales) or f"none, {card.guidance.scale:g} is baked in"
        raise ValueError(f"--guidance: got {guidance}, allowed are {known}")
    kept: torch.dtype = getattr(torch, dtype or card.dtype)
    with working("writing, loading again and comparing"):
        found = export(student.single(count, guidance), out, form, kept)
    called = pipeline_nfe(student.backbone.schedule, card.analytic_first_step, count)
    if called > (least := card_nfe(card, count)):
        console.print(
            f"note: in a pipeline of this family its {count} steps take {called} NFE; "
            f"fewstep.sample makes {least}, its first step is analytic"
        )
    rounded = "" if found.rounded is None else f"; rounded to {name_of(kept)}, {found.rounded:.1e}"
    console.print(
        f"{out.resolve()}\n{plural(count, 'step')}, loaded again and compared: "
        f"largest difference of a pixel {found.difference:.1e}{rounded}"
    )
    if card.head and FORMATS[form].whole:
        console.print("note: its head stays beside the network, in a file of its own; sampling with it needs fewstep")
    for line in in_other_programs(out, source):
        console.print(line, markup=False, highlight=False)
    put_result(
        {
            "folder": out.resolve(),
            "format": form,
            "steps": count,
            "difference": found.difference,
            "rounded": found.rounded,
        }
    )


def in_other_programs(folder: Path, student: str) -> list[str]:
    """Return what a student's own README says of programs other than diffusers.

    Such a line names the file, the strength, and the sampler with its settings. `student` is what the user calls
    the student.
    """
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    _, _, section = text.partition("\n## Other programs\n")
    section = section.replace(f"fewstep export {folder.name} OUT", f"fewstep export {student} NEW_FOLDER")
    return [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("- ")]
