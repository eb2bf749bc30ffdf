"""`fewstep export`: a student as files that are right by themselves for one of its step counts."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from ..api import LoadedStudent, load_student, sample
from ..backbones.load import quiet
from ..export.final import write_final
from ..roles.step_condition import folded_bias
from ..roles.student import plain_lora
from ..training.loop import default_device
from .progress import console
from .sample import student_folder

CLOSE = 1e-4  # largest difference of a pixel, in [0, 1], between the student and its files


def run_export(source: str, out: Path, steps: int | None, base: str | None) -> None:
    """Write, load again, draw, compare; only then is it called done."""
    quiet()
    folder = student_folder(source)
    if folder is None:
        raise ValueError(f"student: {source} is no student folder; pass a run or its final/ folder")
    if out.exists():
        raise ValueError(f"DIR: {out} is there already; choose another folder")
    student = load_student(folder, base, default_device())
    count = steps or student.card.steps[0]
    if count not in student.card.steps:
        raise ValueError(f"--steps: got {count}, this student serves {', '.join(map(str, student.card.steps))}")
    write_single(student, count, out)
    difference = check(student, count, out)
    if difference > CLOSE:
        shutil.rmtree(out)
        raise ValueError(f"export: the files differ from the student by {difference:.1e} in a pixel (allowed {CLOSE:g}); nothing was kept")
    console.print(f"{out.resolve()}\n{count} steps, loaded again and compared: largest difference of a pixel {difference:.1e}")


def write_single(loaded: LoadedStudent, count: int, out: Path) -> None:
    """The student of one step count, as a folder like `final/`."""
    student, card = loaded.student, loaded.card
    times, name = card.timesteps[str(count)], card.name.replace("-".join(map(str, sorted(card.steps))) + "step", f"{count}step")
    single = replace(
        card, name=name, steps=(count,), timesteps={str(count): times}, solver={str(count): card.solver[str(count)]}, time_layer=""
    )
    if card.weights == "none":
        write_final(out, student.backbone, single, student.network, {}, {}, head=student.head)
        return
    if card.weights == "lora":
        state, settings = plain_lora(student, count, torch.tensor(times[:-1], dtype=torch.float64))
        write_final(out, student.backbone, single, student.network, state, settings, head=student.head)
        return
    with folded_bias(student.network, card.time_layer, student.vectors[count]) if student.vectors else nullcontext():
        write_final(out, student.backbone, single, student.network, None, {}, head=student.head)


def check(loaded: LoadedStudent, count: int, out: Path, pictures: int = 2) -> float:
    """Largest difference of a pixel between the student and what lies in `out`, over a few pictures."""
    prompts = [""] * pictures
    return float((sample(loaded, prompts, steps=count) - sample(load_student(out, loaded.student.backbone), prompts)).abs().max())
