"""A student as files for other programs.

The files are written, loaded again, sampled from and compared before the export counts as done.
"""

import copy
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import open_to_others, write_text
from ..backbones.few_step import drawn, pipeline_info, with_network
from ..backbones.files import save_pipeline
from ..backbones.generate import device_of
from ..backbones.load import load_teacher, pipeline_of
from ..backbones.modules import coarsest, dtype_of, seen_dtypes
from ..backbones.parts import DiffusersBackbone
from ..backbones.schedulers import load_scheduler, visits_alone
from ..backbones.step_switch import switch_by_time, times_told
from ..backbones.unconditional import PixelModel, drawn_pixels, pixel_pipeline, save_pixel_pipeline
from ..core import timegrid
from ..core.solvers import SOLVERS
from ..roles.adapters import remove_adapters
from ..roles.roles import TRAINED
from .card import StudentCard, first_times, step_card
from .folder import README, page_of, scheduler_path, seal
from .student import Student

# Largest difference between student and files: of a pixel in [0, 1], or relative to a state's largest element.
CLOSE = 1e-4
# Prompts of the comparison; models of classes know the empty prompt.
MERGED = {torch.float16: 0.02, torch.bfloat16: 0.1}  # the same of merged networks of one's own, by the coarsest dtype
PROMPTS, EMPTY = ["a red cat", "two houses by the sea"], ["", ""]


@dataclass(frozen=True)
class Format:
    """A form in which a student of one step count is written.

    `write` writes a new folder and returns what the files sample when they are loaded again. `whole`: all
    weights are written, in a dtype of choice. `own`: the form is also for networks of one's own.
    """

    text: str
    write: Callable[[Student, Path, torch.dtype], Tensor]
    whole: bool = False
    own: bool = False
    elsewhere: str = ""  # why a network of one's own has no such files


@dataclass(frozen=True)
class Exported:
    """How far the files are from the student.

    `difference` is the largest difference of student and files; `rounded` is what rounding did to
    half-precision files.
    """

    difference: float
    rounded: float | None = None


def export(student: Student, out: Path, form: str, dtype: torch.dtype | None = None) -> Exported:
    """Write a student to a new folder, and compare the files.

    The files are loaded again and sampled from. Raises ValueError with nothing kept.
    """
    own_network = not isinstance(student.backbone, DiffusersBackbone)
    if form not in FORMATS:
        raise ValueError(f"--format: got {form!r}, allowed are {', '.join(FORMATS)}")
    how = FORMATS[form]
    if own_network and not how.own:
        able = [name for name, known in FORMATS.items() if known.own and not (known.whole and student.card.per_step)]
        allowed, there = ", ".join(able), "there are" if able[1:] else "there is"
        raise ValueError(f"--format: got {form}, which {how.elsewhere}; of a network of one's own {there} {allowed}")
    if student.card.per_step and how.whole:
        raise ValueError(
            f"--format: got {form}, which is one network, and each step of this student has weights of its own; "
            f"choose {_without_networks(student, own_network)}"
        )
    if os.path.lexists(out):
        raise ValueError(f"DIR: {out} is there already; choose another folder")
    kept = dtype or getattr(torch, student.card.dtype)
    with seen_dtypes(student.network) as seen:
        wanted = draw(student)
    limit = CLOSE
    if own_network:  # one that calculates in half precision rounds in another way when its LoRA is part of its weights
        limit = max(1.0, float(wanted.abs().max())) * (MERGED.get(coarsest(kept, *seen), CLOSE) if how.whole else CLOSE)
    try:
        difference = float((how.write(student, out, kept) - wanted).abs().max())
        if not difference <= limit:  # also for NaN
            raise ValueError(
                f"export: the files differ from the student by {difference:.1e} "
                f"in an element (allowed {limit:g}); nothing was kept"
            )
        if not how.whole or kept == torch.float32 or own_network:
            return Exported(difference)
        rounded = float((draw(Student.read(out, student.backbone)) - wanted).abs().max())
        if not math.isfinite(rounded):
            raise ValueError(
                f"--dtype: {name_of(kept)} cannot hold this student's numbers, so that its images are not finite; "
                "choose bfloat16 or float32"
            )
        return Exported(difference, rounded)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def draw(student: Student) -> Tensor:
    """Sample what is compared.

    The samples are decoded states of the student's first step count.
    """
    prompts = prompts_for(student)
    with torch.no_grad():
        cond = student.backbone.encode(prompts)
    count = student.card.steps[0]
    states = student.sample_trajectory(cond, list(range(len(prompts))), count, None, None, None)
    return student.backbone.decode(states[-1].x)


def prompts_for(student: Student) -> list[str]:
    """Return the prompts that student and files are compared with."""
    backbone = student.backbone
    if not isinstance(backbone, DiffusersBackbone):
        return [""] * 4
    return PROMPTS if pipeline_info(pipeline_of(backbone)).family.takes_prompts else EMPTY


def write_student(student: Student, out: Path, dtype: torch.dtype) -> Tensor:
    """Write a folder like `final/`, and sample from the folder."""
    student.write(out)
    return draw(Student.read(out, student.backbone if student.base is None else student.base))


def _without_networks(student: Student, own_network: bool) -> str:
    """Return the formats that hold a student's weights of several steps."""
    able = {name: known for name, known in FORMATS.items() if not known.whole and (known.own or not own_network)}
    return " or ".join(name for name in able if name != "kohya" or student.card.weights == "lora")


def write_kohya(student: Student, out: Path, dtype: torch.dtype) -> Tensor:
    """Write a folder like `final/`, and sample from kohya's file.

    diffusers loads the LoRA under kohya's names on a fresh base; where each step has weights of its own, the files of
    all steps.
    """
    pipe = pipeline_of(student.backbone)
    _require_stock(student.card)
    if student.card.weights != "lora":
        raise ValueError(
            "--format: got kohya, which is for LoRA, and this student has none; choose "
            + ("student" if student.card.per_step else "student, merged or pipeline")
        )
    if pipeline_info(pipe).part != "unet" or not pipeline_info(pipe).loads_lora:
        raise ValueError(
            "--format: kohya's names are for the LoRA of a U-Net; "
            "ComfyUI loads --format student of a transformer as it is"
        )
    _require_times(student)
    student.write(out)
    files = [f"{step_card(student.card, k).name}-kohya.safetensors" for k in range(1 + len(student.later))]
    bare = copy.deepcopy(student.network)
    remove_adapters(bare, TRAINED)
    fresh = with_network(pipe, bare, load_scheduler(scheduler_path(out)), type(pipe))
    for k, file in enumerate(files):
        fresh.load_lora_weights(str(out), weight_name=file, adapter_name=f"step_{k + 1}")
    if student.later:
        told = times_told(student.backbone, bare, first_times(student.card))
        switch_by_time(bare, told, lambda k: fresh.set_adapters(f"step_{k + 1}"))
    return drawn_from(fresh, student)


def drawn_from(pipe: Any, student: Student) -> Tensor:
    """Sample from a pipeline as a student is sampled."""
    card, backbone = student.card, student.backbone
    told = card.guidance.scale if isinstance(backbone, DiffusersBackbone) and backbone.embeds_guidance else 1.0
    prompts, steps = prompts_for(student), card.steps[0]
    return drawn(pipe, prompts, steps, told, own_times(student), card.size, backbone.shape)


def own_times(student: Student) -> list[float] | None:
    """Return the times that a stock pipeline has to be given.

    None where the step count alone says the times.
    """
    card, backbone = student.card, student.backbone
    first = str(card.steps[0])
    even = timegrid.even(backbone.schedule, torch.tensor(card.timesteps[first], dtype=torch.float64))
    alone = visits_alone(backbone.scheduler_config, card.solver[first], even)
    return None if alone else card.timesteps[first][:-1]


def _require_stock(card: StudentCard) -> None:
    """Check that a stock pipeline can sample from a student.

    Raises ValueError otherwise.
    """
    special = [s for s in card.solver.values() if not SOLVERS[s].stock]
    by = (
        "a head"
        if card.head
        else "an analytic first step"
        if card.analytic_first_step
        else special[0]
        if special
        else ""
    )
    if by:
        raise ValueError(
            f"--format: this student is sampled with {by}, which no stock pipeline has; choose student or merged"
        )


def _require_times(student: Student) -> None:
    """Check that a stock pipeline takes a student's times.

    Raises ValueError where no pipeline of the student's family takes the times.
    """
    if own_times(student) is not None and not pipeline_info(pipeline_of(student.backbone)).told_by:
        stochastic = SOLVERS[student.card.solver[str(student.card.steps[0])]].stochastic
        why = (
            "this student has fresh noise at every step, and its pipeline tells no scheduler for that its times"
            if stochastic
            else "this student's times are its own, which no scheduler of its family takes"
        )
        raise ValueError(f"--format: {why}; choose student or merged")


def write_merged(student: Student, out: Path, dtype: torch.dtype) -> Tensor:
    """Write a folder like that of a full student.

    For half-precision files, returns what is sampled before the weights are rounded.
    """
    exact = student.merged()
    found = None if dtype == torch.float32 else draw(exact)
    if dtype != dtype_of(exact.network):  # otherwise a few weights of another dtype keep theirs
        exact.network.to(dtype)
    exact.write(out)
    again = Student.read(out, student.backbone if student.base is None else student.base)
    written, own = again.network.state_dict(), exact.network.state_dict()
    if odd := [n for n, v in own.items() if not torch.equal(v.to(written[n]).nan_to_num(), written[n].nan_to_num())]:
        raise ValueError(f"export: {odd[0]} is not in the files what it was in memory; nothing was kept")
    return draw(again) if found is None else found


def write_pipeline(student: Student, out: Path, dtype: torch.dtype) -> Tensor:
    """Write a whole pipeline folder that needs no base.

    For half-precision files, returns what is sampled before the weights are rounded.
    """
    _require_stock(student.card)
    _require_times(student)
    found = write_merged(student, out, dtype)
    backbone, whole, scheduler = student.backbone, student.merged(), load_scheduler(scheduler_path(out))
    network, steps = whole.network.to(dtype), student.card.steps[0]
    if isinstance(backbone, PixelModel):
        save_pixel_pipeline(out, pixel_pipeline(network, scheduler, told=bool(backbone.labels)), backbone.labels)
    else:
        pipe = pipeline_of(backbone)
        # Parts of the base are still in use: copies are rounded.
        parts = with_network(pipe, network, scheduler, type(pipe))
        save_pipeline(out, parts if dtype == torch.float32 else copy.deepcopy(parts).to(dtype))
        write_text(out / README, page_of(out, whole.card, out.name, backbone))
    open_to_others(out)
    seal(out)
    if dtype != torch.float32:
        return found
    again = load_teacher(out, device=device_of(student.network), size=student.card.size or None)
    if isinstance(again, PixelModel):
        return drawn_pixels(again, prompts_for(student), steps)
    return drawn_from(pipeline_of(again), student)


def name_of(dtype: torch.dtype) -> str:
    """Return `bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


FORMATS: dict[str, Format] = {
    "student": Format("a folder like final/, for fewstep, diffusers, ComfyUI and A1111", write_student, own=True),
    "kohya": Format(
        "the same, its LoRA under kohya's names compared, for ComfyUI, A1111 and sd-scripts",
        write_kohya,
        elsewhere="names the layers of diffusers' U-Nets",
    ),
    "merged": Format("one network without LoRA, for fewstep and diffusers", write_merged, whole=True, own=True),
    "pipeline": Format(
        "a whole diffusers folder that needs no base and no fewstep",
        write_pipeline,
        whole=True,
        elsewhere="is a diffusers pipeline",
    ),
}
