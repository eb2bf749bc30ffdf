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

from ..atomic import (
    open_to_others,
    sync,
    sync_all,
    temporary_beside,
    unwritten,
    utf8,
    write_json,
    write_tensors,
    write_text,
)
from ..backbones.base import Backbone
from ..backbones.experts import PARTS, Experts
from ..backbones.few_step import pipeline_info
from ..backbones.files import NETWORK_FILE, load_network, network_places, save_lora, save_network, second_file
from ..backbones.load import INDEX, local, pipeline_of
from ..backbones.parts import DiffusersBackbone
from ..backbones.schedulers import load_scheduler, student_scheduler, visits_alone
from ..backbones.weights import header
from ..core import timegrid
from ..core.schedule import Schedule
from ..hashes import LISTING, UNLISTED, require_listed, weight_hashes
from ..heads.curve import Curve
from ..heads.head import Facts, Head, kind_of, make_head
from ..names import read_name, require_path
from ..reading import object_in, reading
from ..roles.step_condition import unfold, width, without_fold
from ..tensors import read_tensors, require_floating
from ..typed import shown, typed
from .card import FORMAT, StudentCard, first_times, from_format_1, require_sound, step_card
from .clients import client_file, other_programs, pair_files, write_client_file
from .comfyui import workflow
from .headers import own_header
from .hub import find_on_hub, is_hub_id
from .kohya import layers_of
from .metadata import PLAIN, Shown
from .model_card import model_card
from .own_card import own_card

FILE = LISTING  # the card
LORA_FILE = "pytorch_lora_weights.safetensors"
CONDITION_FILE = "step_condition.safetensors"
HEAD_FILE = "trajp.safetensors"
SCHEDULER = "scheduler"
WORKFLOW = "comfyui-workflow.json"
README = "README.md"
SAMPLES = "samples"  # the folder of previews in a run
PARTS_OF_STUDENT = ("peft", SCHEDULER, "unet", *PARTS)  # its subfolders, besides those of a whole pipeline
KINDS_OF_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")  # in them
CURVE = "curve."  # prefix of a head's curve in the head's file
AGAIN = "export the run again"
STEP = "step_"  # and a number from 1: the subfolder of a step with weights of its own


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
    # What each step after the first has, where each has weights of its own: LoRA, settings and network alone.
    later: Sequence["Parts"] = ()


def find_folder(source: str | Path) -> Path | None:
    """Return the student's folder if `source` is or has one.

    A run has a student's folder in `final/`. None where there is no student's folder.
    """
    return next((p for p in (Path(source), Path(source) / "final") if (p / FILE).is_file()), None)


def on_hub(source: object) -> bool:
    """Return whether a source is a hub id, and no local path."""
    return isinstance(source, str) and is_hub_id(source) and not os.path.lexists(source)


def find_student(source: str | Path, option: str, weights: bool = True) -> Path | None:
    """Find the student's folder of a source.

    The source is a run, a student's folder, or a hub id. A student of the hub is downloaded, without `weights` its
    card alone. None where there is no student. Raises ValueError where the hub cannot say.
    """
    folder = find_folder(source)
    if folder is not None or not isinstance(source, str) or not on_hub(source):
        return folder
    try:
        return find_on_hub(source, weights)
    except ValueError as error:
        raise ValueError(
            f"{option}: {source} is no student folder here, and {error}; pass a run, its final/ folder or a hub id"
        ) from error


def require_folder(source: str | Path, option: str) -> Path:
    """Return the student's folder of a source, as `find_student` does.

    Raises ValueError if there is none.
    """
    require_path(source, option)
    if (folder := find_student(source, option)) is None:
        here = f"no student folder here, and on the hub it has no {FILE}" if on_hub(source) else "no student folder"
        raise ValueError(f"{option}: {source} is {here}; pass a run or its final/ folder")
    return folder


def holds_student(folder: Path) -> bool:
    """Return whether there is a student's card in this very folder."""
    return (folder / FILE).is_file()


def card_time(folder: Path) -> int:
    """Return when a student's card was written, in nanoseconds."""
    return (folder / FILE).stat().st_mtime_ns


def preview_file(iteration: int) -> str:
    """Return the name of a preview's file."""
    return f"step_{iteration:06d}.png"


def preview_of(folder: Path, card: StudentCard) -> Path:
    """Return where the preview of a run's student would be."""
    return folder.parent / SAMPLES / preview_file(card.iterations)


def is_whole_pipeline(folder: Path) -> bool:
    """Return whether a student's folder is a pipeline, which needs no base."""
    return (folder / INDEX).is_file()


def lora_path(folder: Path) -> Path:
    """Return where a student's LoRA is."""
    return folder / LORA_FILE


def step_folders(folder: Path, card: StudentCard) -> list[Path]:
    """Return where each set of a student's weights is.

    `step_1`, `step_2` and so on where each step has weights of its own, and otherwise the folder itself.
    """
    return [folder / f"{STEP}{k}" for k in range(1, card.steps[0] + 1)] if card.per_step else [folder]


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
    if card.per_step:
        first, *later = [_read_step(card, place, backbone) for place in step_folders(folder, card)]
        return replace(first, later=later)
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


def _read_step(card: StudentCard, place: Path, backbone: Backbone) -> Parts:
    """Read the weights of one step, in a folder of their own."""
    if card.weights == "lora":
        return Parts(card, read_lora(place))
    require_listed(place.parent, place.name)
    return Parts(card, network=load_network(place, backbone.module))


def read_lora(folder: Path, pair: bool = False) -> dict[str, Tensor]:
    """Read a student's LoRA in PEFT's file format.

    The layer names have no prefix `unet.` or `transformer.`. Those of a `pair` of networks, which has two files, begin
    with the networks' names. Raises ValueError for a file that is missing, damaged or changed.
    """
    found: dict[str, Tensor] = {}
    first = lora_path(folder)
    for path, part in zip((first, second_file(first)), PARTS, strict=True) if pair else [(first, "")]:
        require_listed(*_listed(path))
        with reading(f"student: {path}", AGAIN, "is missing or damaged"):
            state = require_floating(read_tensors(path))
        start = f"{part}." if part else ""
        found |= {start + k.removeprefix("unet.").removeprefix("transformer."): v for k, v in state.items()}
    return found


def _listed(path: Path) -> tuple[Path, str]:
    """Return where a weight file is listed.

    Returns the folder with the card, and the file's place in it.
    """
    of_step = not holds_student(path.parent) and holds_student(path.parent.parent)
    folder = path.parent.parent if of_step else path.parent
    return folder, path.relative_to(folder).as_posix()


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
        each = [part.lora or {} for part in (parts, *parts.later)]
        require_change({f"{k}.{n}" if parts.later else n: v for k, own in enumerate(each) for n, v in own.items()})
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
    card = parts.card
    schedule, config = backbone.schedule, backbone.scheduler_config
    for k, (place, own) in enumerate(zip(step_folders(folder, card), (parts, *parts.later), strict=True)):
        place.mkdir(exist_ok=True)
        _write_weights(folder, place, step_card(card, k), backbone, own)
    if card.weights == "lora" and not card.own_network:
        info = pipeline_info(pipeline_of(backbone))
        drawn_size = backbone.drawn_size if isinstance(backbone, DiffusersBackbone) else 0
        file, other = client_file(card, info), pair_files(card)[1] if info.boundary else ""
        graph = workflow(card, info.family, file, drawn_size, schedule, config, info.comfyui, info.boundary, other)
        if graph is not None:
            write_json(folder / WORKFLOW, graph)
    if parts.head is not None:
        write_head(folder, parts.head)
    if parts.vectors:
        write_tensors(folder / CONDITION_FILE, {f"{k:g}": v.float() for k, v in parts.vectors.items()})
    if not card.own_network:
        even = times_are_even(card, schedule)
        scheduler = student_scheduler(config, card.steps, card.solver[str(card.steps[0])], even)
        scheduler.save_pretrained(scheduler_path(folder))
    write_json(folder / FILE, asdict(replace(card, files=weight_hashes(folder))))
    write_text(folder / README, page_of(folder, card, name, backbone))


def _write_weights(folder: Path, place: Path, card: StudentCard, backbone: Backbone, parts: Parts) -> None:
    """Write one set of a student's weights to `place`.

    The LoRA for other programs is next to the card.
    """
    if parts.network is not None:
        save_network(place, parts.network)
    if card.weights != "lora":
        return
    lora = parts.lora or {}
    save_lora(lora_path(place), backbone.module, lora, parts.settings, own_header(card))
    if not card.own_network:
        info = pipeline_info(pipeline_of(backbone))
        write_client_file(folder, lora_path(place), backbone.module, card, info, lora, backbone.image_size)


def times_are_even(card: StudentCard, schedule: Schedule) -> bool:
    """Return whether a step count alone says a student's times."""
    return all(timegrid.even(schedule, torch.tensor(times, dtype=torch.float64)) for times in card.timesteps.values())


def page_of(folder: Path, card: StudentCard, name: str, backbone: Backbone | None, shown: Shown = PLAIN) -> str:
    """Return the README.md of a student's folder, which readers call `name`.

    The folder has the student's weights and scheduler. `backbone` is that of the base, also of meta tensors, or that
    of the folder itself where it is a whole pipeline; None does for a network of one's own.
    """
    if card.own_network or backbone is None:
        return own_card(card, name, shown)
    info, whole = pipeline_info(pipeline_of(backbone)), is_whole_pipeline(folder)
    schedule, scheduler = backbone.schedule, load_scheduler(scheduler_path(folder))
    alone = visits_alone(backbone.scheduler_config, card.solver[str(card.steps[0])], times_are_even(card, schedule))
    elsewhere, second = "", ""
    if file := client_file(step_card(card, 0), info):
        own = header(lora_path(step_folders(folder, card)[0]))
        layers = layers_of([k.removeprefix("unet.").removeprefix("transformer.") for k in own])
        elsewhere = other_programs(card, info, schedule, backbone.scheduler_config, file, layers, name)
        second = second_file(lora_path(folder)).name if info.boundary else ""
    shift = float(scheduler.config.get("shift", 1.0))
    return model_card(
        card,
        name,
        type(scheduler).__name__,
        info,
        alone,
        elsewhere,
        whole=whole,
        shift=shift,
        second=second,
        shown=shown,
    )


def files_for_others(folder: Path, card: StudentCard, page: str) -> tuple[dict[str, Path | bytes], list[str]]:
    """Return a student's files as others get them, by their place.

    Also returns the places of the files that are left out, which are no part of the student. Paths of this machine
    are cut to their last part. `card` and `page` stand for those in the folder. Raises ValueError for a weight file
    that is missing or has changed.
    """
    require_listed(folder, *card.files)
    with reading(f"student: {folder / INDEX}", AGAIN):
        named = object_in(folder / INDEX) if is_whole_pipeline(folder) else {}
    parts = {*PARTS_OF_STUDENT, *named, *(p.name for p in step_folders(folder, card) if card.per_step)}
    first = lora_path(folder)
    own = (first.name, second_file(first).name, CONDITION_FILE, HEAD_FILE, NETWORK_FILE)  # old cards list no files
    found: dict[str, Path | bytes] = {}
    left = list[str]()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        place = path.relative_to(folder)
        top = place.parts[0]
        if len(place.parts) == 1:
            kept = place.name in (*card.files, *own, WORKFLOW, INDEX) or place.name.endswith(UNLISTED)
        else:
            kept = top in parts and place.suffix in KINDS_OF_FILES
        if kept and not any(part.startswith(".") for part in place.parts):
            found[place.as_posix()] = _without_paths(path)
        elif place.as_posix() not in (FILE, README):
            left.append(place.as_posix())
    return {README: utf8(page), FILE: utf8(json.dumps(asdict(card), indent=2) + "\n"), **found}, left


def _without_paths(path: Path) -> Path | bytes:
    """Return a file, or its content without a local path."""
    if path.name != INDEX and not path.name.endswith("config.json"):
        return path
    with reading(f"student: {path}", AGAIN):
        value = object_in(path)
    named = {key: text for key in ("_name_or_path", "name_or_path") if isinstance(text := value.get(key), str)}
    cut = {key: Path(text).name for key, text in named.items() if text and local(text)}
    return utf8(json.dumps({**value, **cut}, indent=2) + "\n") if cut else path


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
