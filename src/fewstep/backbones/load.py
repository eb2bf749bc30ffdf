"""Loading a teacher by its name.

A teacher is bundled, a diffusers folder, a pipeline on the hub, or a checkpoint in one file.
"""

import hashlib
import inspect
import math
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
from torch import nn
from transformers.utils import logging as transformers_logging

from ..hashes import sha256_of
from ..names import expanded
from ..reading import ReadError, json_in, out_of_memory, reading, reason, unreadable
from .base import Backbone, speechless
from .denoiser_file import INDEX as INDEX_OF_SHARDS
from .denoiser_file import DenoiserFile, denoiser_file, read_denoiser
from .families import FAMILIES, family_of_pipeline, unsupported
from .family import Family
from .lora import DENOISERS, fuse, second_of_pair
from .parts import (
    Defer,
    DiffusersBackbone,
    Sized,
    SizedVideo,
    able_to_single,
    fetched,
    load_pipeline,
    network_kind,
    networks,
    part_names,
)
from .settings import require_settings
from .single_file import SUFFIX, Checkpoint, configuration, is_file, load_checkpoint, read_checkpoint
from .sizes import Size, video_size
from .trial import require_runs
from .weights import UnfitError, inside

FUSED = " + "  # separates a teacher and the LoRAs that are fused into it
WITHIN = " \\+ "  # stands for FUSED inside a name
INDEX = "model_index.json"  # in every pipeline's folder
BUNDLED = Path(__file__).resolve().parent.parent / "zoo"
HASHES = "hashes.json"  # SHA-256 of the bundled teachers' weights


class Source(NamedTuple):
    """Where a teacher comes from: a pipeline and fused LoRAs.

    Each LoRA is a file, folder or hub id with a strength. `reading` says how to read a checkpoint in one file
    (see `single_file.read_checkpoint`).
    """

    place: str
    loras: tuple[tuple[str, float], ...] = ()
    reading: str = ""

    @property
    def names(self) -> list[str]:
        """Names of the pipeline and its LoRAs: the last parts of paths."""
        paths = (self.place, *(lora for lora, _ in self.loras))
        return [Path(os.path.abspath(path)).name.removesuffix(SUFFIX) for path in paths]  # `.` gets its folder's name


def source_of(text: str | Path) -> Source:
    """Split `owner/name + style.safetensors@0.8 + other.safetensors` into its parts.

    The strength of a LoRA is 1 by default. A checkpoint is `FILE` or `FILE@READING`. A text or part that
    exists as a path is this path, whatever characters it contains. Raises ValueError with one line.
    """
    whole = str(text)
    parts = [whole] if os.path.exists(expanded(whole)) else [part.replace(WITHIN, FUSED) for part in whole.split(FUSED)]
    place, *styles = (own if os.path.exists(own := expanded(part)) else expanded(part.strip()) for part in parts)
    end = next((e for e in (INDEX_OF_SHARDS, SUFFIX) if f"{e}@" in place), SUFFIX)
    file, told, reading = ("", "", "") if os.path.exists(place) else place.partition(f"{end}@")
    return Source(file + end if told else place, tuple(_style(style) for style in styles), expanded(reading))


def _style(text: str) -> tuple[str, float]:
    """Split a LoRA into path and strength.

    Raises ValueError for a strength other than a finite number that is not 0.
    """
    path, at, strength = text.rpartition("@")
    if not at or os.path.exists(text):
        return text, 1.0
    try:
        if math.isfinite(value := float(strength)) and value:
            return path, value
    except ValueError:
        if text.endswith(SUFFIX):
            return text, 1.0
    raise ValueError(
        f"--fuse-lora: got {text!r}, allowed are PATH or PATH@STRENGTH with a number other than 0, "
        "e.g. style.safetensors@0.8"
    )


def fused(teacher: str, styles: Sequence[str]) -> str:
    """Join a teacher and the LoRAs fused into it as one text.

    `source_of` splits the text again.
    """
    whole = teacher.replace(FUSED, WITHIN) if os.path.exists(expanded(teacher)) else teacher
    return FUSED.join([whole, *map(_said, map(_style, map(expanded, styles)))]) if styles else teacher


def _said(style: tuple[str, float]) -> str:
    path, strength = style
    return path.replace(FUSED, WITHIN) + (f"@{strength:g}" if strength != 1 or "@" in path else "")


def absolute(source: str) -> str:
    """Return the same source with absolute local paths.

    The text then means the same in every working folder.
    """
    given = source_of(source)
    place = _whole(given.place).replace(FUSED, WITHIN) + (f"@{_whole(given.reading)}" if given.reading else "")
    return FUSED.join([place, *(_said((_whole(path), strength)) for path, strength in given.loras)])


def _whole(path: str) -> str:
    return os.path.abspath(path) if path not in bundled() and os.path.exists(path) else path


def local(path: str) -> bool:
    """Return whether a part of a source is a local path.

    Bundled names and hub ids are not.
    """
    return path not in bundled() and (
        os.path.isabs(path) or os.path.exists(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)
    )


def hub_id(source: str) -> str:
    """Return the hub id of a source's pipeline.

    Empty for a bundled or local pipeline.
    """
    place = source_of(source).place
    return "" if place in bundled() or local(place) else place


def called(source: str) -> str:
    """Return the same source without the folders above local paths.

    For texts that other people read.
    """
    given = source_of(source)

    def own(path: str) -> str:
        return Path(os.path.abspath(path)).name if local(path) else path

    place = own(given.place).replace(FUSED, WITHIN) + (f"@{own(given.reading)}" if given.reading else "")
    return FUSED.join([place, *(_said((own(path), strength)) for path, strength in given.loras)])


def seen_from(source: str, folder: Path) -> str:
    """Return the same source with missing paths resolved from a student.

    A missing relative path is looked for in `folder` and in all folders above `folder`.
    """
    given = source_of(source)

    def found(path: str) -> str:
        if os.path.isabs(path) or path in bundled() or os.path.exists(path):
            return path
        return next((str(there) for above in folder.resolve().parents if (there := above / path).exists()), path)

    place = found(given.place).replace(FUSED, WITHIN) + (f"@{found(given.reading)}" if given.reading else "")
    return FUSED.join([place, *(_said((found(path), strength)) for path, strength in given.loras)])


def require_lora_files(source: Source) -> Source:
    """Return `source` if the files of its LoRAs exist.

    Raises ValueError otherwise.
    """
    for path, _ in source.loras:
        if path.endswith(SUFFIX) and not Path(path).expanduser().is_file():
            raise ValueError(f"--fuse-lora: there is no {path}; pass a .safetensors file, a folder or a hub id")
    return source


def bundled() -> list[str]:
    """Return the names of the teachers that ship with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob(f"*/{INDEX}"))


def require_shipped(folder: Path) -> None:
    """Check that a bundled teacher's weights are the shipped ones.

    Raises UnfitError otherwise.
    """
    with reading(folder.parent / HASHES, "install fewstep again"):
        known = json_in(folder.parent / HASHES)
    for name, digest in known.items():
        file = folder.parent / name
        if file.is_relative_to(folder) and (not file.is_file() or sha256_of(file) != digest):
            raise UnfitError(f"{file.relative_to(folder)} is not the file that was shipped", "install fewstep again")


def load_teacher(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    size: Size | None = None,
    defer: Defer = lambda *_: None,
) -> Backbone:
    """Load a teacher with all its networks on `device`.

    `source` is a bundled name, a folder, a hub id (`owner/name`), a checkpoint (`FILE.safetensors` or
    `FILE@CONFIG`), or a denoiser alone beside its pipeline (`FILE@PIPELINE`), with LoRAs to fuse behind ` + ` (see
    `source_of`). `single_file.read_checkpoint` says what a checkpoint predicts and where its configuration is,
    `denoiser_file` what a denoiser's file may be. `size` is the height and width of the images in pixels, or
    `WIDTHxHEIGHTxFRAMES` of videos, if other than the size that the teacher was made for. `defer` says which
    networks of a pipeline without fused LoRAs are loaded later, see `load_pipeline`; then no trial call is made.

    Raises ValueError with one line where the source is none of these, is damaged, or belongs to a family that
    is not supported.
    """
    given = require_lora_files(source_of(source))
    place, family, checkpoint = locate(given)
    try:
        if given.place in bundled():
            require_shipped(Path(place))
        if checkpoint is None:
            later = (lambda *_: None) if given.loras else defer
            pipe = load_pipeline(family.pipeline, place, dtype, family.parts, family.kinds, later)
        elif isinstance(checkpoint, DenoiserFile):
            pipe = load_beside(family, checkpoint, place, dtype)
        else:
            pipe = load_checkpoint(family.pipeline, checkpoint, Path(place), dtype, family.parts)
        backbone = backbone_of(family, pipe, FUSED.join(given.names))
    except Exception as error:  # diffusers raises a different type for each kind of damage
        raise damaged(checkpoint or place, error) from error
    for lora, strength in given.loras:
        fuse(pipe, lora, strength)
    later_on = any(p.is_meta for n in networks(pipe) for p in n.parameters())
    if not later_on:
        pipe.to(device)
    backbone = at_size(replace(backbone, source=str(source)), size)
    if later_on:
        return backbone
    try:
        require_runs(backbone)
    except UnfitError as error:
        raise damaged(checkpoint or place, error) from error
    return backbone


def backbone_of(family: Family, pipe: DiffusionPipeline, name: str) -> Any:
    """Return the backbone around a pipeline whose settings are all followed.

    Raises UnfitError for other settings, and where the clean estimate at the noisiest time is lost.
    """
    family.check(require_settings(pipe))
    backbone = family.from_pipeline(pipe, name)
    able_to_single(backbone.module)
    if why := speechless(backbone.schedule, backbone.row):
        raise UnfitError(
            f"its network {why}",
            "set rescale_betas_zero_snr to false in scheduler/scheduler_config.json, "
            "or prediction_type to v_prediction where the network predicts that",
        )
    return backbone


def download(source: str | Path) -> None:
    """Download a pipeline of the hub to the cache.

    Nothing is done to any other source. Raises ValueError as `load_teacher` does.
    """
    given = source_of(source)
    if hub_id(given.place) and not is_file(given.place):
        _, family, _ = locate(given)
        try:
            fetched(family.pipeline, given.place, family.parts)
        except Exception as error:  # diffusers raises a different type for each kind of trouble
            raise damaged(given.place, error) from error


def load_beside(family: Family, file: DenoiserFile, place: str | Path, dtype: torch.dtype) -> DiffusionPipeline:
    """Load a pipeline whose denoiser is in files of its own.

    Of a pair, both networks are. Raises UnfitError.
    """
    parts = [p for p in DENOISERS if p in inspect.signature(family.pipeline).parameters]
    own = dict.fromkeys(parts[: len(file.networks)])
    folder = Path(place) if Path(place).is_dir() else fetched(family.pipeline, str(place), {**family.parts, **own})
    named = part_names(family.pipeline, family.pipeline.load_config(folder))
    if len(file.networks) < len([p for p in parts if p in named]):
        name = file.networks[0][0].name
        raise UnfitError(
            f"{file.base} has two networks, and {name} is one",
            "name the file for high noise, with this one next to it under the same name with low in place of high"
            if second_of_pair(name)
            else "put the file for low noise next to it, under the same name with low in place of high",
        )
    networks: dict[str, Any] = {}
    for part, files in zip(own, file.networks, strict=True):
        kind: Any = network_kind(family.pipeline, part, named.get(part, ""), family.kinds)
        networks[part] = read_denoiser(kind, files, kind.load_config(str(place), subfolder=part), dtype)
    return load_pipeline(family.pipeline, folder, dtype, {**family.parts, **networks}, family.kinds)


def locate(source: Source) -> tuple[str | Path, Family, Checkpoint | DenoiserFile | None]:
    """Return where a teacher is configured, with its family and checkpoint.

    The configuration is a folder or a hub id. The checkpoint is None where the weights are not in one file.
    Raises ValueError with one line.
    """
    if is_file(source.place):
        try:
            alone = denoiser_file(Path(source.place), source.reading)
        except UnfitError as error:
            raise damaged(source.place, error) from error
        if alone is not None:
            place = find(alone.base)
            return place, family_of(place), alone
    checkpoint = read_checkpoint(Path(source.place), source.reading) if is_file(source.place) else None
    place = find(source.place) if checkpoint is None else configuration(checkpoint)
    family = family_of(place)
    if checkpoint is not None and family.pipeline is not checkpoint.pipeline:
        raise ValueError(
            f"teacher: {checkpoint.file} is a {checkpoint.pipeline.__name__}, "
            f"{checkpoint.config} configures a {family.pipeline.__name__}; "
            f"pass {checkpoint.file}@FOLDER with its own kind"
        )
    return place, family, checkpoint


def find(source: str | Path) -> str | Path:
    """Return the folder of a bundled teacher or a path.

    A hub id comes back unchanged. Raises ValueError for anything else.
    """
    name, folder = str(source), Path(source).expanduser()
    if name in bundled():
        if (folder / INDEX).is_file() and folder.resolve() != BUNDLED / name:
            raise ValueError(
                f"teacher: {name} is a bundled teacher and a folder here; "
                f"pass ./{name} for the folder, or rename it for the bundled one"
            )
        return BUNDLED / name
    if not folder.exists():
        if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
            raise ValueError(
                f"teacher: got {name!r}, allowed are {', '.join(bundled())}, a diffusers pipeline folder, "
                f"a hub id such as owner/name, or a checkpoint FILE{SUFFIX}"
            )
        return name
    if not folder.is_dir():
        raise ValueError(f"teacher: {name} is no folder; pass a diffusers pipeline folder or a checkpoint FILE{SUFFIX}")
    if not (folder / INDEX).exists():
        raise ValueError(
            f"teacher: {folder} is no diffusers pipeline (it has no {INDEX}); "
            "pass the folder that save_pretrained wrote"
        )
    return folder


def at_size(backbone: Backbone, size: Size | None) -> Backbone:
    """Return the same model for images or videos of another size.

    A number is the height and width of images. None leaves the model unchanged. Raises ValueError where
    the model has another size and no choice, and for a size that the network's levels or patches do not
    divide.
    """
    if isinstance(backbone, SizedVideo):
        return backbone if size is None else replace(backbone, size=_fitting(backbone, size))
    if size is None or (not isinstance(backbone, Sized) and size == backbone.image_size):
        return backbone
    if not isinstance(backbone, Sized):
        raise ValueError(f"size: got {size}, {backbone.name} makes images of one size; leave it out")
    unit, most = backbone.pixels * backbone.multiple, backbone.largest * backbone.pixels
    if not isinstance(size, int) or not unit <= size <= most or size % unit:
        allowed = f"allowed for {backbone.name} are multiples of {unit} up to {most}"
        raise ValueError(f"size: got {size}, {allowed}{'' if isinstance(size, int) else ', one number for both sides'}")
    return backbone.at(size // backbone.pixels)


def _fitting(backbone: SizedVideo, size: Size) -> str:
    """Return a size that a video backbone can have. Raises ValueError otherwise."""
    own, (wide, high, every), most = video_size(size), backbone.unit, backbone.largest
    fits = not (own.width % wide or own.height % high or (own.frames - 1) % every)
    if not fits or not all(0 < side <= limit for side, limit in zip(own, most, strict=True)):
        raise ValueError(
            f"size: got {size}, allowed for {backbone.name} are widths in multiples of {wide}, heights of {high}, "
            f"and {every} n + 1 frames, up to {most}"
        )
    return str(own)


def require_reached(name: str) -> None:
    """Check that the hub or the cache has a pipeline.

    Sends one request with a timeout of 10 s, where diffusers would try for a minute. Raises ValueError that
    names the cause.
    """
    if isinstance(try_to_load_from_cache(name, INDEX), str):
        return
    here = f"there is no folder {name} here"
    try:
        get_hf_file_metadata(hf_hub_url(name, INDEX), timeout=10)
    except OfflineModeIsEnabled as error:
        raise ValueError(
            f"teacher: {here}, and HF_HUB_OFFLINE forbids asking the hub; check the path, or unset it"
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"teacher: {name} is gated; accept its terms on its page on the hub, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"teacher: {here}, and the hub has none of that name, or it is private; check it, or run: hf auth login"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"teacher: {name} on the hub is no diffusers pipeline (it has no {INDEX}); pass one that is"
        ) from error
    except Exception as error:  # the network raises a different type for each kind of trouble
        raise ValueError(
            f"teacher: {here}, and the hub cannot be reached ({reason(error)}); check the path, or the network"
        ) from error


def family_of(source: str | Path) -> Family:
    """Return the family of a folder or a hub id.

    Raises ValueError with one line where the index cannot be read or the family is not supported.
    """
    if isinstance(source, str) and not Path(source).exists():
        require_reached(source)
    try:
        if Path(source).is_dir():
            inside(Path(source) / INDEX, Path(source))
        index = DiffusionPipeline.load_config(str(source))
        name = index["_class_name"] if isinstance(index, dict) else index
    except Exception as error:  # the hub and diffusers raise a different type for each kind of trouble
        if Path(source).exists():
            raise ValueError(
                f"teacher: {source}: its {INDEX} cannot be read ({reason(error)}); save or download the pipeline again"
            ) from error
        raise ValueError(
            f"teacher: {source} is no folder here, and not to be had from the hub ({trouble(error)}); "
            "check the name, or pass a folder"
        ) from error
    if not isinstance(name, str) or name not in FAMILIES:
        called = name if isinstance(name, str) and name.isprintable() else repr(name)[:80]
        raise ValueError(f"teacher: {source} is a {unsupported(called)}")
    return FAMILIES[name]


def trouble(error: Exception) -> str:
    """Say why the hub gave nothing.

    Network errors hide in the chain of causes behind the errors of diffusers and the hub's client.
    """
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    lost = next((c for c in causes if isinstance(c, ConnectionError | TimeoutError | socket.gaierror)), None)
    return reason(error) if lost is None else f"no network: {reason(lost)}"


def damaged(source: str | Path | Checkpoint | DenoiserFile, error: Exception) -> ValueError:
    """Return the error to raise for a pipeline that cannot be loaded."""
    if isinstance(error, UnfitError):
        return ValueError(f"teacher: {source}: {error}; {error.cure or 'download it again'}")
    if isinstance(error, ReadError):
        return error
    if out_of_memory(error):
        return unreadable(
            f"teacher: {source}", error, "check the sizes that its configuration says, or load it in bfloat16"
        )
    return unreadable(f"teacher: {source}", error, "check it, or download it again", "cannot be loaded")


def quiet() -> None:
    """Silence the loading bars and notices of diffusers and transformers.

    For programs that show their own.
    """
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def fingerprint(
    *modules: nn.Module, through: torch.dtype = torch.float32, tell: Callable[[int], None] = lambda done: None
) -> str:
    """Hash networks' own weights, and return the first 16 digits.

    SHA-256, independent of dtype down to half precision. Adapters are left out. `through` is the dtype that
    the weights had when an earlier fingerprint was taken, where they have a finer dtype now. `tell` is told the
    bytes so far.
    """
    return fingerprints(*modules, through=through, tell=tell)[-1]


def fingerprints(
    *modules: nn.Module, through: torch.dtype = torch.float32, tell: Callable[[int], None] = lambda done: None
) -> list[str]:
    """Return fingerprints of the first network, of two, and so on."""
    digest, found, done = hashlib.sha256(), [], 0
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            if "lora_" not in name:
                digest.update(name.replace(".base_layer", "").encode())
                digest.update(
                    tensor.detach()
                    .cpu()
                    .to(through if tensor.is_floating_point() else tensor.dtype)
                    .half()
                    .contiguous()
                    .numpy()
                    .tobytes()
                )
                done += tensor.nbytes
                tell(done)
        found.append(digest.hexdigest()[:16])
    return found


def pipeline_of(base: str | Path | Backbone | DiffusionPipeline) -> DiffusionPipeline:
    """Return the diffusers pipeline of a name, path or backbone.

    A pipeline comes back unchanged. Raises ValueError for a backbone without a pipeline.
    """
    if isinstance(base, DiffusionPipeline):
        return base
    backbone = load_teacher(base) if isinstance(base, str | Path) else base
    if not isinstance(backbone, DiffusersBackbone):
        raise ValueError(f"base: {backbone.name} is no diffusers pipeline; sample it with fewstep.sample")
    return backbone.pipe


def around(pipe: DiffusionPipeline, name: str) -> Backbone:
    """Return the backbone around a loaded pipeline.

    Raises ValueError for a family that is not supported, and for settings that fewstep does not follow.
    """
    family = family_of_pipeline(pipe)
    try:
        found: Backbone = backbone_of(family, pipe, name)
        assert found.shape
    except UnfitError as error:
        raise ValueError(f"base: {name}: {error}; {error.cure or 'pass another pipeline'}") from error
    return found
