"""From a name to a teacher: a bundled one, a diffusers folder, or a hub id."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from .base import Backbone
from .sd import StableDiffusion, load_sd
from .unconditional import PixelModel, load_pixel_model

BUNDLED = Path(__file__).resolve().parent.parent / "zoo"
Loader = Callable[[str | Path, str, torch.dtype], StableDiffusion | PixelModel]
LOADERS: dict[str, Loader] = {
    "StableDiffusionPipeline": load_sd,
    "DDPMPipeline": load_pixel_model,
}  # pipeline class in model_index.json -> loader


def bundled() -> list[str]:
    """Names of the teachers that ship with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def load_teacher(source: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Backbone:
    """A teacher by bundled name, folder, or hub id (`owner/name`), with all its networks on `device`.

    Raises ValueError with one line when the source is none of these, is damaged, or is of a family that is not supported.
    """
    folder = BUNDLED / str(source) if str(source) in bundled() else Path(source)
    if not folder.exists():
        if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise ValueError(
                f"teacher: got {str(source)!r}, allowed are {', '.join(bundled())}, a diffusers pipeline folder, or a hub id such as owner/name"
            )
        return _load(str(source), load_sd, str(source), dtype, device)
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"teacher: {folder} is no diffusers pipeline (it has no model_index.json); pass the folder that save_pretrained wrote"
        )
    try:
        family = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"teacher: {index} cannot be read ({error}); save the pipeline again") from error
    if family not in LOADERS:
        raise ValueError(f"teacher: {folder} is a {family}, supported are {', '.join(LOADERS)}; wrap your own network in fewstep.Denoiser")
    return _load(folder, LOADERS[family], str(source), dtype, device)


def quiet() -> None:
    """Keep diffusers' and transformers' own loading bars and notices off the screen: for programs that show their own."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _load(source: str | Path, loader: Loader, name: str, dtype: torch.dtype, device: str | torch.device) -> Backbone:
    try:
        backbone = loader(source, Path(name).name, dtype)
    except Exception as error:  # diffusers raises a different type for each kind of damage
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ValueError(f"teacher: {source} cannot be loaded ({reason}); check the folder, or download it again") from error
    backbone.pipe.to(device)
    return backbone


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
    if not isinstance(backbone, StableDiffusion | PixelModel):
        raise ValueError(f"base: {backbone.name} is no diffusers pipeline; sample it with fewstep.sample")
    return backbone.pipe
