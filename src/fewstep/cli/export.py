"""`fewstep export`: a student as files that are right by themselves for one of its step counts, compared with it before they are called done."""

import copy
import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..atomic import open_to_others, write_text
from ..backbones.few_step import drawn, facts_of, with_network
from ..backbones.files import save_pipeline
from ..backbones.generate import device_of
from ..backbones.load import fingerprint, load_teacher, pipeline_of, quiet
from ..backbones.schedulers import load_scheduler
from ..backbones.student_scheduler import calls
from ..backbones.unconditional import PixelModel, drawn_pixels, pixel_pipeline, save_pixel_pipeline
from ..core import timegrid
from ..export.card import DTYPES, StudentCard, card_evaluations
from ..export.final import seal, write_final
from ..export.model_card import model_card
from ..names import made_name
from ..report.words import plural
from ..roles.adapters import merge, remove_adapters
from ..roles.roles import TRAINED
from ..roles.step_condition import fold, folded_bias
from ..roles.student import Student, plain_lora
from ..runs.sampling import sample
from ..runs.students import LoadedStudent, load_student, student_folder
from .preflight import require_parent
from .progress import console
from .sample import open_student

CLOSE = 1e-4  # largest difference of a pixel, in [0, 1], between the student and its files
PROMPTS, EMPTY = ["a red cat", "two houses by the sea"], ["", ""]  # drawn for the comparison; models of classes know the empty one


def run_export(
    source: str, out: Path, form: str, steps: int | None, base: str | None, guidance: float | None = None, dtype: str | None = None
) -> None:
    """Write, load again, draw, compare; only then is it called done. `dtype` is that of whole networks, by default the base's."""
    quiet()
    folder = student_folder(source)
    if folder is None:
        raise ValueError(f"student: {source} is no student folder; pass a run or its final/ folder")
    if form not in FORMATS:
        raise ValueError(f"--format: got {form!r}, allowed are {', '.join(FORMATS)}")
    if os.path.lexists(out):
        raise ValueError(f"DIR: {out} is there already; choose another folder")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: got {dtype!r}, allowed are {', '.join(DTYPES)}")
    if dtype is not None and form not in WHOLE:
        raise ValueError(f"--dtype: got {dtype} with --format {form}, whose LoRA stays as it was trained; it is for {' and '.join(WHOLE)}")
    require_parent(out, "DIR")
    student = open_student(folder, base, torch.float32)  # files are compared to a precision that halves do not have
    if base is not None:  # what is written goes with this one
        student = replace(student, card=replace(student.card, base=base, base_hash=fingerprint(student.student.backbone.module)))
    kept: torch.dtype = getattr(torch, dtype or student.card.dtype)
    count = steps or student.card.steps[0]
    if count not in student.card.steps:
        raise ValueError(f"--steps: got {count}, this student serves {', '.join(map(str, student.card.steps))}")
    if guidance is not None and guidance not in student.card.scales:
        known = ", ".join(f"{w:g}" for w in student.card.scales) or f"none, {student.card.teacher_guidance:g} is baked in"
        raise ValueError(f"--guidance: got {guidance}, allowed are {known}")
    scale = guidance or (student.card.scales or (1.0,))[0]
    wanted = sample(student, prompts_for(student), steps=count, guidance=scale)
    rounded = ""
    try:
        found = FORMATS[form](student, single(student.card, count, scale), out, kept)
        difference = float((found - wanted).abs().max())
        if not difference <= CLOSE:  # NaN is as far as can be
            raise ValueError(
                f"export: the files differ from the student by {difference:.1e} in a pixel (allowed {CLOSE:g}); nothing was kept"
            )
        if form in WHOLE and kept != torch.float32:
            again = float((sample(load_student(out, student.student.backbone), prompts_for(student)) - wanted).abs().max())
            if not math.isfinite(again):
                raise ValueError(
                    f"--dtype: {_named(kept)} cannot hold this student's numbers, it draws nothing; choose bfloat16 or float32"
                )
            rounded = f"; rounded to {_named(kept)}, as the base was, {again:.1e}"
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    asked = calls(student.student.backbone.schedule, student.card.free_first, count)
    if asked > (least := card_evaluations(student.card, count)):
        console.print(
            f"note: in a pipeline of this family its {count} steps take {asked} network calls; fewstep.sample makes {least}, its first direction is free"
        )
    console.print(
        f"{out.resolve()}\n{plural(count, 'step')}, loaded again and compared: largest difference of a pixel {difference:.1e}{rounded}"
    )


def prompts_for(loaded: LoadedStudent) -> list[str]:
    """What student and files both draw."""
    return PROMPTS if facts_of(pipeline_of(loaded.student.backbone)).takes_prompts else EMPTY


def single(card: StudentCard, count: int, scale: float) -> StudentCard:
    """The card of the student of one step count and one guidance scale."""
    name = card.name.replace("-".join(map(str, sorted(card.steps))) + "step", f"{count}step")
    times, solver = {str(count): card.timesteps[str(count)]}, {str(count): card.solver[str(count)]}
    baked, ending = (scale, f"-guidance{scale:g}") if card.scales else (card.teacher_guidance, "")
    alpha = None if card.rank is None else float(card.rank)  # what `plain_lora` makes of any other
    return replace(
        card,
        name=made_name(name + ending),
        steps=(count,),
        timesteps=times,
        solver=solver,
        time_layer="",
        scales=(),
        teacher_guidance=baked,
        alpha=alpha,
    )


def told(loaded: LoadedStudent, card: StudentCard) -> float:
    """What a student of many is told to be that of this card."""
    return card.teacher_guidance if loaded.card.scales else card.steps[0]


def write_student(loaded: LoadedStudent, card: StudentCard, out: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """A folder like `final/`. Returns what it draws when it is loaded again."""
    student, count = loaded.student, card.steps[0]
    if card.weights == "none":
        write_final(out, student.backbone, card, student.network, {}, {}, head=student.head)
    elif card.weights == "lora":
        state, settings = plain_lora(student, told(loaded, card), torch.tensor(card.timesteps[str(count)][:-1], dtype=torch.float64))
        write_final(out, student.backbone, card, student.network, state, settings, head=student.head)
    else:
        with (
            folded_bias(student.network, loaded.card.time_layer, student.vectors[told(loaded, card)]) if student.vectors else nullcontext()
        ):
            write_final(out, student.backbone, card, student.network, None, {}, head=student.head)
    return sample(load_student(out, student.backbone), prompts_for(loaded))


def write_kohya(loaded: LoadedStudent, card: StudentCard, out: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same, its LoRA under kohya's names. Returns what diffusers draws with that file on a fresh base."""
    pipe = pipeline_of(loaded.student.backbone)
    _require_stock(card)
    if card.weights != "lora":
        raise ValueError("--format: got kohya, which is for LoRA, and this student has none; choose student, merged or pipeline")
    if facts_of(pipe).part != "unet" or not facts_of(pipe).loads_lora:
        raise ValueError("--format: kohya's names are for the LoRA of a U-Net; ComfyUI loads --format student of a transformer as it is")
    _require_told(loaded, card)
    write_student(loaded, card, out)
    (file,) = out.glob("*-kohya.safetensors")
    bare = copy.deepcopy(loaded.student.network)
    remove_adapters(bare, TRAINED)
    fresh = with_network(pipe, bare, load_scheduler(out / "scheduler"), type(pipe))
    fresh.load_lora_weights(str(out), weight_name=file.name)
    return drawn(fresh, PROMPTS, card.steps[0], times=own_times(loaded, card), shape=loaded.student.backbone.shape)


def own_times(loaded: LoadedStudent, card: StudentCard) -> list[float] | None:
    """What a stock pipeline has to be told of this student's times; None where its step count says them."""
    times = card.timesteps[str(card.steps[0])]
    return None if timegrid.even(loaded.student.backbone.schedule, torch.tensor(times, dtype=torch.float64)) else times[:-1]


def _require_stock(card: StudentCard) -> None:
    """Raises ValueError for a student that is sampled as no stock pipeline does."""
    by = "a head" if card.head else "a free first direction" if card.free_first else "iPNDM" if "ipndm" in card.solver.values() else ""
    if by:
        raise ValueError(f"--format: this student is sampled with {by}, which no stock pipeline has; choose student or merged")


def _require_told(loaded: LoadedStudent, card: StudentCard) -> None:
    """Raises ValueError for a student whose times no stock pipeline of its family can be told."""
    if own_times(loaded, card) is not None and not facts_of(pipeline_of(loaded.student.backbone)).takes_times:
        raise ValueError(
            "--format: this student's times are its own, which no scheduler of its family can be told; choose student or merged"
        )


def merged(loaded: LoadedStudent, card: StudentCard) -> nn.Module:
    """The student as one network without LoRA and condition."""
    student = loaded.student
    network = copy.deepcopy(student.network)
    if student.layers:
        merge(network, student.adapter)
    if student.vectors:
        fold(network, student.backbone.time_layer, student.vectors[told(loaded, card)])
    return network


def write_merged(loaded: LoadedStudent, card: StudentCard, out: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """A folder like that of a full student. Returns what it draws when it is loaded again, of halves what it draws before they are rounded."""
    backbone, head, network = loaded.student.backbone, loaded.student.head, merged(loaded, card)
    exact = LoadedStudent(Student(backbone, network, (), "student", head=head, free=loaded.student.free), _whole(card))
    found = None if dtype == torch.float32 else sample(exact, prompts_for(loaded))
    write_final(out, backbone, _whole(card), network.to(dtype), None, {}, head=head)
    again = load_student(out, backbone)
    if found is None:
        return sample(again, prompts_for(loaded))
    written, own = again.student.network.state_dict(), network.state_dict()
    if odd := [n for n, v in own.items() if not torch.equal(v.to(written[n].dtype), written[n])]:
        raise ValueError(f"export: {odd[0]} is not in the files what it was in memory; nothing was kept")
    return found


def _whole(card: StudentCard) -> StudentCard:
    return replace(card, weights="full", rank=None, alpha=None)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_pipeline(loaded: LoadedStudent, card: StudentCard, out: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """A whole pipeline folder that needs no base beside it. Returns what diffusers draws with it, of halves as `write_merged`."""
    _require_stock(card)
    _require_told(loaded, card)
    found = write_merged(loaded, card, out, dtype)
    backbone, network, scheduler = loaded.student.backbone, merged(loaded, card).to(dtype), load_scheduler(out / "scheduler")
    if isinstance(backbone, PixelModel):
        save_pixel_pipeline(out, pixel_pipeline(network, scheduler, told=bool(backbone.labels)), backbone.labels)
    else:
        pipe = pipeline_of(backbone)
        # The base's other parts are copied where they are rounded: they still serve.
        parts = with_network(pipe, network, scheduler, type(pipe))
        save_pipeline(out, parts if dtype == torch.float32 else copy.deepcopy(parts).to(dtype))
        even = own_times(loaded, card) is None
        page = model_card(_whole(card), out.name, type(scheduler).__name__, facts_of(pipe), even, whole=True)
        write_text(out / "README.md", page)
    open_to_others(out)
    seal(out)
    if dtype != torch.float32:
        return found
    again = load_teacher(out, device=device_of(loaded.student.network))
    if isinstance(again, PixelModel):
        return drawn_pixels(again, prompts_for(loaded), card.steps[0])
    return drawn(pipeline_of(again), prompts_for(loaded), card.steps[0], times=own_times(loaded, card), shape=again.shape)


WHOLE = ("merged", "pipeline")  # formats of whole networks, which have a dtype
FORMATS: dict[str, Callable[[LoadedStudent, StudentCard, Path, torch.dtype], Tensor]] = {
    "student": write_student,
    "kohya": write_kohya,
    "merged": write_merged,
    "pipeline": write_pipeline,
}
