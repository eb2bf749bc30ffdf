"""A student's folder, with its only reader and writer.

The folder holds card, weights, condition vectors, head and scheduler, and what other programs need.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..atomic import open_to_others, sync, sync_all, temporary_beside, unwritten, write_json, write_tensors, write_text
from ..backbones.base import Backbone
from ..backbones.experts import PARTS, Experts
from ..backbones.few_step import pipeline_info
from ..backbones.files import load_network, network_places, save_lora, save_network, second_file
from ..backbones.load import pipeline_of
from ..backbones.parts import DiffusersBackbone
from ..backbones.schedulers import student_scheduler, visits_alone
from ..core import timegrid
from ..core.schedule import Schedule
from ..hashes import LISTING, require_listed, weight_hashes
from ..heads.curve import Curve
from ..heads.head import Facts, Head, kind_of, make_head
from ..names import read_name, require_path
from ..reading import object_in, reading
from ..roles.step_condition import unfold, width, without_fold
from ..tensors import read_tensors, require_floating
from ..typed import shown, typed
from .card import FORMAT, StudentCard, first_times, from_format_1, require_sound
from .clients import other_programs, pair_files, write_client_file
from .comfyui import workflow
from .headers import own_header
from .kohya import layers_of
from .model_card import model_card
from .own_card import own_card

FILE = LISTING  # the card
LORA_FILE = "pytorch_lora_weights.safetensors"
CONDITION_FILE = "step_condition.safetensors"
HEAD_FILE = "trajp.safetensors"
SCHEDULER = "scheduler"
WORKFLOW = "comfyui-workflow.json"
CURVE = "curve."  # prefix of a head's curve in the head's file
AGAIN = "export the run again"


@dataclass(frozen=True)
class Parts:
    """What a student's folder holds.

    `lora` and `network` by themselves absorb no condition value; the condition values are in `vectors`.
    """

    card: StudentCard
    lora: Mapping[str, Tensor] | None = None  # in PEFT's file format
    settings: Mapping[str, Any] = field(default_factory=dict)  # PEFT's, for the header of the LoRA
    network: nn.Module | None = None  # of a student with weights of its own
    vectors: Mapping[float, Tensor] = field(default_factory=dict)  # by condition value, for the time embedding
    head: nn.Module | None = None


def find_folder(source: str | Path) -> Path | None:
    """Return the student's folder if `source` is or has one.

    A run has a student's folder in `final/`. None where there is no student's folder.
    """
    return next((p for p in (Path(source), Path(source) / "final") if (p / FILE).is_file()), None)


def require_folder(source: str | Path, option: str) -> Path:
    """Return the student's folder of a run or of itself.

    Raises ValueError if there is none.
    """
    if (folder := find_folder(require_path(source, option))) is None:
        raise ValueError(f"{option}: {source} is no student folder; pass a run or its final/ folder")
    return folder


def holds_student(folder: Path) -> bool:
    """Return whether there is a student's card in this very folder."""
    return (folder / FILE).is_file()


def card_time(folder: Path) -> int:
    """Return when a student's card was written, in nanoseconds."""
    return (folder / FILE).stat().st_mtime_ns


def lora_path(folder: Path) -> Path:
    """Return where a student's LoRA is."""
    return folder / LORA_FILE


def scheduler_path(folder: Path) -> Path:
    """Return where a student's scheduler is."""
    return folder / SCHEDULER


def read_card(folder: Path) -> StudentCard:
    """Read the card of a student's folder.

    Raises ValueError if there is no card, for a card of another format, and for values that no student has.
    """
    path = folder / FILE
    if not path.exists():
        raise ValueError(f"student: {folder} has no {FILE}; pass the final/ folder of a run")
    with reading(f"student: {path}", AGAIN):
        value = object_in(path)
        if "format" not in value:
            raise ValueError("it lacks its format")
    written = value["format"]
    if type(written) is not int or written not in (1, FORMAT):
        raise ValueError(
            f"student: {path} has format {shown(written)}, this version reads 1 and {FORMAT}; "
            "install the fewstep that wrote it"
        )
    name = read_name(value.get("name"), f"student: {path}: name")
    with reading(f"student: {path}", AGAIN, f"does not fit format {written}"):
        own = from_format_1(value) if written == 1 else value
        card: StudentCard = typed(StudentCard, {**own, "name": name})
        require_sound(card)
    return card


def read_parts(folder: Path, backbone: Backbone) -> Parts:
    """Read a student's folder for its base.

    Raises ValueError for a file that is missing, damaged, changed or another student's.
    """
    card, module = read_card(folder), backbone.module
    vectors = read_vectors(folder, card, module) if card.time_layer else {}
    head = read_head(folder, backbone.schedule) if card.head else None
    if card.weights == "lora":
        state = read_lora(folder, isinstance(module, Experts))
        return Parts(card, without_fold(state, card.time_layer) if vectors else state, vectors=vectors, head=head)
    if card.weights == "none":
        return Parts(card, vectors=vectors, head=head)
    require_listed(folder, *(place.name for place in network_places(folder, module)))
    network = load_network(folder, module)
    if vectors:
        unfold(backbone, network, vectors[card.condition_values[0]], first_times(card))
    return Parts(card, network=network, vectors=vectors, head=head)


def read_lora(folder: Path, pair: bool = False) -> dict[str, Tensor]:
    """Read a student's LoRA in PEFT's file format.

    The layer names have no prefix `unet.` or `transformer.`. Those of a `pair` of networks, which has two files, begin
    with the networks' names. Raises ValueError for a file that is missing, damaged or changed.
    """
    found: dict[str, Tensor] = {}
    first = lora_path(folder)
    for path, part in zip((first, second_file(first)), PARTS, strict=True) if pair else [(first, "")]:
        require_listed(folder, path.name)
        with reading(f"student: {path}", AGAIN, "is missing or damaged"):
            state = require_floating(read_tensors(path))
        start = f"{part}." if part else ""
        found |= {start + k.removeprefix("unet.").removeprefix("transformer."): v for k, v in state.items()}
    return found


def read_vectors(folder: Path, card: StudentCard, network: nn.Module) -> dict[float, Tensor]:
    """Read one vector for each value that a student is conditioned on.

    Raises ValueError for a file that is missing, damaged or changed, or that lacks a vector.
    """
    path, size, values = folder / CONDITION_FILE, width(network, card.time_layer), card.condition_values
    require_listed(folder, CONDITION_FILE)
    with reading(f"student: {path}", AGAIN, "is missing or damaged"):
        vectors = {float(k): v for k, v in require_floating(read_tensors(path)).items()}
        if {f"{k:g}" for k in vectors} != {f"{k:g}" for k in values} or any(
            v.shape != (size,) for v in vectors.values()
        ):
            raise ValueError(f"it has no vectors of {size} numbers for {', '.join(f'{k:g}' for k in values)}")
        return vectors


def read_head(folder: Path, schedule: Schedule) -> Head:
    """Read a student's head.

    Raises ValueError for a file that is missing, damaged or changed.
    """
    path = folder / HEAD_FILE
    require_listed(folder, HEAD_FILE)
    with reading(f"student: {path}", AGAIN, "is missing or damaged"):
        tensors = read_tensors(path)
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["fewstep"])
        curve = Curve(*(tensors.pop(f"{CURVE}{part}") for part in ("weights", "shape", "r2")))
        grids = tuple(torch.tensor(g, dtype=torch.float64) for g in about["grids"])
        head = make_head(about["kind"], schedule, Facts(curve, tensors["centre"], about["spread"], grids))
        head.load_state_dict(tensors)
    return head


def write_head(folder: Path, head: nn.Module) -> Path:
    """Write a head with everything that it was made from.

    The tensors are the head's weights and its curve; the header has kind, spread and time grids. Returns the
    file's path.
    """
    assert isinstance(head, Head)
    curve = head.facts.curve
    tensors: dict[str, Tensor] = dict(head.state_dict())
    tensors |= {f"{CURVE}weights": curve.weights, f"{CURVE}shape": curve.shape, f"{CURVE}r2": curve.r2}
    about = {"kind": kind_of(head), "spread": head.facts.spread, "grids": [g.tolist() for g in head.facts.grids]}
    write_tensors(folder / HEAD_FILE, tensors, {"fewstep": json.dumps(about)})
    return folder / HEAD_FILE


def write_parts(folder: Path, backbone: Backbone, parts: Parts) -> Path:
    """Write a student to `folder`, and return `folder`.

    An older student is replaced only when all new files are there. A LoRA is written twice: under diffusers'
    standard name, and for programs that only know files (see `write_client_file`). Either file by itself is
    right for the card's first step count; `vectors` are for the others.

    Raises ValueError for a LoRA that changes nothing, and OSError where the folder holds anything but a
    student.
    """
    card = parts.card
    if card.weights == "lora":
        require_change(parts.lora or {})
    if os.path.lexists(folder) and not holds_student(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise OSError(
            f"cannot write {folder}: what is there is no student; "
            "move it away, then run the same command again: training is not repeated"
        )
    return _replaced(folder, lambda new: _write_files(new, folder.name, backbone, parts))


def copy_student(source: Path, folder: Path, leave_out: Sequence[str] = ()) -> Path:
    """Copy a student's folder, without some files, and return `folder`.

    An older student there is replaced once the copy is whole. Raises OSError.
    """
    return _replaced(folder, lambda new: shutil.copytree(source, new, ignore=lambda *_: leave_out, dirs_exist_ok=True))


def _replaced(folder: Path, fill: Callable[[Path], object]) -> Path:
    """Fill a new folder, and put it in the place of `folder`."""
    new, old = temporary_beside(folder), temporary_beside(folder)
    try:
        new.mkdir(parents=True)
        fill(new)
        open_to_others(new)
        sync_all(new)
        if folder.is_dir():
            os.replace(folder, old)
        os.replace(new, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        if old.is_dir() and not folder.exists():
            os.replace(old, folder)
        raise unwritten(folder, error, " (training is not repeated)") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _write_files(folder: Path, name: str, backbone: Backbone, parts: Parts) -> None:
    """Write every file of a student.

    The folder will be called `name`.
    """
    card, file = parts.card, ""
    schedule, config = backbone.schedule, backbone.scheduler_config
    even = all(timegrid.even(schedule, torch.tensor(times, dtype=torch.float64)) for times in card.timesteps.values())
    if parts.network is not None:
        save_network(folder, parts.network)
    if card.weights == "lora":
        lora = parts.lora or {}
        save_lora(lora_path(folder), backbone.module, lora, parts.settings, own_header(card))
        if not card.own_network:
            info = pipeline_info(pipeline_of(backbone))
            file = write_client_file(folder, lora_path(folder), backbone.module, card, info, lora, backbone.image_size)
            drawn_size = backbone.drawn_size if isinstance(backbone, DiffusersBackbone) else 0
            other = pair_files(card)[1] if info.boundary else ""
            graph = workflow(card, info.family, file, drawn_size, schedule, config, info.comfyui, info.boundary, other)
            if graph is not None:
                write_json(folder / WORKFLOW, graph)
    if parts.head is not None:
        write_head(folder, parts.head)
    if parts.vectors:
        write_tensors(folder / CONDITION_FILE, {f"{k:g}": v.float() for k, v in parts.vectors.items()})
    if card.own_network:
        about = own_card(card, name)
    else:
        info = pipeline_info(pipeline_of(backbone))
        solver = card.solver[str(card.steps[0])]
        scheduler, alone = student_scheduler(config, card.steps, solver, even), visits_alone(config, solver, even)
        scheduler.save_pretrained(scheduler_path(folder))
        elsewhere = other_programs(card, info, schedule, config, file, layers_of(parts.lora or {}), name)
        shift = float(scheduler.config.get("shift", 1.0))
        second = second_file(lora_path(folder)).name if info.boundary else ""
        about = model_card(card, name, type(scheduler).__name__, info, alone, elsewhere, shift=shift, second=second)
    write_json(folder / FILE, asdict(replace(card, files=weight_hashes(folder))))
    write_text(folder / "README.md", about)


def seal(folder: Path) -> None:
    """Write the hashes of a student's weight files anew.

    Some weight files may have been written after the card.
    """
    write_json(folder / FILE, asdict(replace(read_card(folder), files=weight_hashes(folder))))


def require_change(lora: Mapping[str, Tensor]) -> None:
    """Check that a LoRA changes its network.

    The LoRA is [out, r] x [r, in] per layer. Raises ValueError for a LoRA that has no layers, is zero in all
    layers, or holds numbers that are not finite.
    """
    layers = layers_of(lora)
    if not layers:
        raise ValueError(
            "student: its LoRA has no layers, so it is its teacher; train the run again with roles.targets=all"
        )
    if odd := [n for n, v in lora.items() if not bool(torch.isfinite(v).all())]:
        raise ValueError(
            f"student: its LoRA holds numbers that are not finite ({odd[0]} and {len(odd) - 1} more); "
            "take an earlier checkpoint"
        )
    if not any(bool(lora[f"{n}.lora_A.weight"].any()) and bool(lora[f"{n}.lora_B.weight"].any()) for n in layers):
        raise ValueError(
            f"student: its LoRA is zero in all of its {len(layers)} layers, so it is its teacher; "
            "train it for longer, or at a higher train.lr"
        )
