"""A student of a network of one's own as files, loaded again and compared before it is called done."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

from ..backbones.parts import Piped
from ..roles.adapters import merge
from ..words import told_in_python
from .sampling import sample
from .step import Step
from .students import LoadedStudent, load_student

CLOSE = 1e-4  # largest difference of an element between the student and its files, relative to the largest element
FORMATS = {"student": "its LoRA or its network, with its card", "merged": "one network without LoRA, with its card"}
ELSEWHERE = {"kohya": "names the layers of diffusers' U-Nets", "pipeline": "is a diffusers pipeline"}


@told_in_python
def export_student(model: LoadedStudent | Step, folder: str | Path, form: str = "student") -> Path:
    """Write a student of a network of one's own to a new `folder` as `student` or `merged` and compare what is loaded again. Returns `folder`.

    `merged` is one network, `network.safetensors`, which `module.load_state_dict` takes. Students of diffusers pipelines have more formats, by `fewstep export`.
    Raises ValueError with nothing kept.
    """
    student, folder = model.snapshot() if isinstance(model, Step) else model, Path(folder)
    if isinstance(student.student.backbone, Piped):
        raise ValueError(
            f"model: {student.card.name} is a student of a diffusers pipeline; save it and run: fewstep export FOLDER {folder}"
        )
    if form in ELSEWHERE:
        raise ValueError(f"form: got {form}, which {ELSEWHERE[form]}; of a network of one's own there are {', '.join(FORMATS)}")
    if form not in FORMATS:
        raise ValueError(f"form: got {form!r}, allowed are {', '.join(FORMATS)}")
    if folder.exists():
        raise ValueError(f"folder: {folder} is there already; choose another")
    whole = merged(student) if form == "merged" else student
    try:
        whole.save(folder)
        again = load_student(folder, student.base)
        prompts = [""] * 4
        wanted, found = (sample(s, prompts) for s in (student, again))
        if not float((found - wanted).abs().max()) <= CLOSE * max(1.0, float(wanted.abs().max())):
            raise ValueError(f"export: the files differ from the student by {float((found - wanted).abs().max()):.1e}; nothing was kept")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def merged(student: LoadedStudent) -> LoadedStudent:
    """The same with its LoRA in the weights."""
    own = student.student
    if not own.layers:
        return student
    network = copy.deepcopy(own.network)
    merge(network, own.adapter)
    return LoadedStudent(
        replace(own, network=network, layers=()), replace(student.card, weights="full", rank=None, alpha=None), student.base
    )
