"""From a name to a teacher: a bundled one, a diffusers folder, a hub id, or a checkpoint in one file."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    CogVideoXPipeline,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from .base import Backbone
from .cogvideox import CogVideoX, around_cogvideox
from .parts import LatentUNet, Piped, load_pipeline
from .pixart import PixArt, around_pixart
from .sd import StableDiffusion, around_sd
from .sd3 import StableDiffusion3, around_sd3
from .sdxl import StableDiffusionXL, around_sdxl
from .single_file import SUFFIX, Checkpoint, configuration, is_file, load_checkpoint, read_checkpoint
from .unconditional import PixelModel, around_pixels

FUSED = " + "  # between a teacher and the LoRAs that are fused into it
BUNDLED = Path(__file__).resolve().parent.parent / "zoo"


class Source(NamedTuple):
    """Where a teacher comes from: a pipeline, and LoRAs that are fused into its weights, each a file, folder or hub id with its strength.

    `reading` says how a checkpoint in one file is to be read (see `single_file.read_checkpoint`).
    """

    place: str
    loras: tuple[tuple[str, float], ...] = ()
    reading: str = ""

    @property
    def names(self) -> list[str]:
        """What the pipeline and its LoRAs are called: the last parts of their paths."""
        return [Path(path).name.removesuffix(SUFFIX) for path in (self.place, *(lora for lora, _ in self.loras))]


def source_of(text: str | Path) -> Source:
    """`owner/name + style.safetensors@0.8 + other.safetensors` in its parts; 1 where no strength is said; a checkpoint is `FILE` or `FILE@READING`.

    Raises ValueError with one line.
    """
    place, *styles = (part.strip() for part in str(text).split(FUSED))
    file, told, reading = place.partition(f"{SUFFIX}@")
    loras = []
    for style in styles:
        path, at, strength = style.rpartition("@")
        try:
            loras.append((path, float(strength)) if at else (style, 1.0))
        except ValueError:
            raise ValueError(f"--fuse-lora: got {style!r}, allowed are PATH or PATH@STRENGTH, e.g. style.safetensors@0.8") from None
    return Source(file + SUFFIX if told else place, tuple(loras), reading)


def present(source: Source) -> Source:
    """The same, if the files of its LoRAs are there. Raises ValueError where one is not."""
    for path, _ in source.loras:
        if path.endswith(".safetensors") and not Path(path).is_file():
            raise ValueError(f"--fuse-lora: there is no {path}; pass a .safetensors file, a folder or a hub id")
    return source


@dataclass(frozen=True)
class Family:
    """A diffusers pipeline, the backbone that goes around it, and parts that are loaded otherwise than it says."""

    pipeline: type[DiffusionPipeline]
    around: Callable[[Any, str], StableDiffusion | StableDiffusionXL | PixArt | CogVideoX | StableDiffusion3 | PixelModel]
    parts: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    family.pipeline.__name__: family
    for family in (
        Family(StableDiffusionPipeline, around_sd, {"safety_checker": None, "requires_safety_checker": False}),
        Family(StableDiffusionXLPipeline, around_sdxl),
        Family(PixArtAlphaPipeline, around_pixart),
        Family(PixArtSigmaPipeline, around_pixart),
        Family(CogVideoXPipeline, around_cogvideox),
        Family(StableDiffusion3Pipeline, around_sd3),
        Family(DDPMPipeline, around_pixels),
        Family(ConsistencyModelPipeline, around_pixels),
    )
}


def bundled() -> list[str]:
    """Names of the teachers that ship with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def load_teacher(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    size: int | None = None,
    guidance_rescale: float = 0.0,
) -> Backbone:
    """A teacher by bundled name, folder, hub id (`owner/name`), or checkpoint (`FILE.safetensors`, or `FILE@CONFIG`), with all its networks on `device`.

    LoRAs behind ` + ` are fused in (see `source_of`). What a checkpoint predicts and where its configuration is: see `single_file.read_checkpoint`.
    `size` is the height and width of its pictures, where it is to draw others than it was made for; `guidance_rescale` belongs to its guidance (see
    `backbones.base.rescaled`). Raises ValueError with one line when the source is none of these, is damaged, or is of a family that is not supported.
    """
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale: got {guidance_rescale}, allowed are numbers from 0 to 1")
    given = present(source_of(source))
    place, family, checkpoint = locate(given)
    try:
        if checkpoint is None:
            pipe = load_pipeline(family.pipeline, place, dtype, family.parts)
        else:
            pipe = load_checkpoint(family.pipeline, checkpoint, Path(place), dtype, family.parts)
        backbone = family.around(pipe, FUSED.join(given.names))
    except Exception as error:  # diffusers raises a different type for each kind of damage
        raise damaged(checkpoint or place, error) from error
    for lora, strength in given.loras:
        fuse(pipe, lora, strength)
    backbone.pipe.to(device)
    return at_size(replace(backbone, guidance_rescale=guidance_rescale, source=str(source)), size)


def fuse(pipe: DiffusionPipeline, lora: str, strength: float) -> None:
    """Add a LoRA to a pipeline's own weights, in whatever names diffusers reads. Raises ValueError with one line where it cannot."""
    if not isinstance(pipe, LoraBaseMixin):
        raise ValueError(f"--fuse-lora: diffusers loads no LoRA into a {type(pipe).__name__}; leave it out")
    try:
        pipe.load_lora_weights(lora)
        pipe.fuse_lora(lora_scale=strength)
        pipe.unload_lora_weights()
    except Exception as error:  # as many types as there are kinds of damage
        raise ValueError(
            f"--fuse-lora: {lora} cannot be fused into this teacher ({_reason(error)}); check the file and what it was made for"
        ) from error


def locate(source: Source) -> tuple[str | Path, Family, Checkpoint | None]:
    """Where a teacher's configuration is, a folder or hub id, its family, and the checkpoint where its weights are in one file. Raises ValueError with one line."""
    checkpoint = read_checkpoint(Path(source.place), source.reading) if is_file(source.place) else None
    place = find(source.place) if checkpoint is None else configuration(checkpoint)
    family = family_of(place)
    if checkpoint is not None and family.pipeline is not checkpoint.pipeline:
        raise ValueError(
            f"teacher: {checkpoint.file} is a {checkpoint.pipeline.__name__}, {checkpoint.config} configures a {family.pipeline.__name__}; pass {checkpoint.file}@FOLDER with its own kind"
        )
    return place, family, checkpoint


def find(source: str | Path) -> str | Path:
    """The folder of a bundled name or of a folder; a hub id stays one. Raises ValueError for anything else."""
    folder = BUNDLED / str(source) if str(source) in bundled() else Path(source)
    if not folder.exists():
        if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise ValueError(
                f"teacher: got {str(source)!r}, allowed are {', '.join(bundled())}, a diffusers pipeline folder, a hub id such as owner/name, or a checkpoint FILE{SUFFIX}"
            )
        return str(source)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"teacher: {folder} is no diffusers pipeline (it has no model_index.json); pass the folder that save_pretrained wrote"
        )
    return folder


def at_size(backbone: Backbone, size: int | None) -> Backbone:
    """The same model for pictures of `size` x `size`; None leaves it as it is. Raises ValueError where it has one size alone."""
    if size is None or size == backbone.picture_size:
        return backbone
    if not isinstance(backbone, LatentUNet):
        raise ValueError(f"size: got {size}, {backbone.name} makes pictures of one size; leave it out")
    unit = backbone.pipe.vae_scale_factor * 2 ** (len(backbone.pipe.unet.config.block_out_channels) - 1)
    if size < unit or size % unit:
        raise ValueError(f"size: got {size}, allowed for {backbone.name} are multiples of {unit}")
    return replace(backbone, size=size // backbone.pipe.vae_scale_factor)


def place_encoders(backbone: Backbone, device: str | torch.device) -> None:
    """Move the encoders: to the CPU, where they still serve, slowly, while a training that has its embeddings needs the room."""
    for encoder in backbone.encoders:
        encoder.to(device)


def family_of(source: str | Path) -> Family:
    """The family of a folder or a hub id. Raises ValueError with one line when it cannot be read or is not supported."""
    try:
        name = DiffusionPipeline.load_config(str(source))["_class_name"]
    except Exception as error:  # the hub and diffusers raise a different type for each kind of trouble
        raise ValueError(
            f"teacher: {source}: its model_index.json cannot be read ({_reason(error)}); save or download the pipeline again"
        ) from error
    if name not in FAMILIES:
        raise ValueError(f"teacher: {source} is a {name}, supported are {', '.join(FAMILIES)}; wrap your own network in fewstep.Denoiser")
    return FAMILIES[name]


def damaged(source: str | Path | Checkpoint, error: Exception) -> ValueError:
    """What to say of a pipeline that cannot be loaded."""
    return ValueError(f"teacher: {source} cannot be loaded ({_reason(error)}); check it, or download it again")


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def quiet() -> None:
    """Keep diffusers' and transformers' own loading bars and notices off the screen: for programs that show their own."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def fingerprint(*modules: nn.Module) -> str:
    """SHA-256 of networks' own weights, adapters left out, independent of dtype down to half precision; first 16 digits."""
    digest = hashlib.sha256()
    for name, tensor in (item for module in modules for item in sorted(module.state_dict().items())):
        if "lora_" not in name:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def pipeline_of(base: str | Path | Backbone | DiffusionPipeline) -> DiffusionPipeline:
    """The diffusers pipeline behind a name, a folder, a hub id or a backbone. Raises ValueError where there is none."""
    if isinstance(base, DiffusionPipeline):
        return base
    backbone = load_teacher(base) if isinstance(base, str | Path) else base
    if not isinstance(backbone, Piped):
        raise ValueError(f"base: {backbone.name} is no diffusers pipeline; sample it with fewstep.sample")
    return backbone.pipe


def around(pipe: DiffusionPipeline, name: str) -> Backbone:
    """The backbone of a pipeline that is there already. Raises ValueError for a family that is not supported."""
    family = next((f for f in FAMILIES.values() if isinstance(pipe, f.pipeline)), None)
    if family is None:
        raise ValueError(
            f"base: {type(pipe).__name__} is not supported, allowed are {', '.join(FAMILIES)}; wrap your own network in fewstep.Denoiser"
        )
    return family.around(pipe, name)
