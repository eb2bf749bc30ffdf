"""Denoisers in files of their own, beside a named pipeline.

A file has one network alone, in the original program's layout (ComfyUI's `diffusion_models/`) or in diffusers'. It may
be sharded with an index, and may keep its weights in 8 bits. What else a pipeline is made of comes from the pipeline
that is named with it. Every tensor of the file is accounted for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.models.modeling_utils import no_init_weights
from safetensors import safe_open
from torch import Tensor, nn

from ..reading import json_in, reason
from .weights import UnfitError, Weights, header, refuse, require_finite

SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
STARTS = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")  # before names in files
FLOATS8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CODES = (torch.int8, torch.uint8)
FEW = 0.1  # share of a network's tensors; a file that lacks more of diffusers' names has other names
# Names of the scale next to a weight of 8 bits, and of what else such files hold, which weights do not need.
SCALES = (".scale_weight", ".weight_scale")
ASIDE = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant)$")
OTHER_BITS = re.compile(r"(^|\.)(SCB|absmax|quant_map|quant_state\..*|weight_scale_2|qweight|qzeros)$")
BITS_CURE = "pass the model in float16, bfloat16, float32, or in float8 with a scale for each tensor or row"


@dataclass(frozen=True)
class DenoiserFile:
    """One or two networks in files, and their pipeline.

    `networks` has the files of each network: several where the weights are sharded. Of a pair the first is for high
    noise. `base` is a folder or a hub id.
    """

    networks: tuple[tuple[Path, ...], ...]
    base: str

    def __str__(self) -> str:
        return f"{self.networks[0][0]} beside {self.base}"


def denoiser_file(file: Path, base: str) -> DenoiserFile | None:
    """Return what `FILE@BASE` names, if the file holds a denoiser alone.

    A file for high noise has that for low noise next to it, under the same name with `low` in place of `high`. None for
    files of another kind, such as whole checkpoints and LoRAs. Raises UnfitError for a damaged file or index.
    """
    if not file.is_file() or not base:
        return None
    files = _files(file)
    try:
        names = [n for f in files for n in header(f)]
    except UnfitError:
        if len(files) > 1:
            raise
        return None  # what reads whole checkpoints says what is wrong with it
    if any("lora" in n for n in names) or any(n.startswith(("first_stage_model.", "cond_stage_model.")) for n in names):
        return None
    if any("input_blocks." in n for n in names):
        return None  # a U-Net of Stable Diffusion, which `single_file` reads
    second = file.with_name(re.sub(r"high(?=[-_ ]?noise|$)", "low", file.name))
    pair = [_files(second)] if second != file and second.is_file() else []
    return DenoiserFile((files, *pair), base)


def _files(file: Path) -> tuple[Path, ...]:
    if not file.name.endswith(INDEX):
        return (file,)
    try:
        named = sorted(set(json_in(file)["weight_map"].values()))
    except Exception as error:  # each kind of damage raises another type
        raise UnfitError(f"{file.name} is damaged ({reason(error)})") from error
    odd = [n for n in named if not isinstance(n, str) or Path(n).name != n or not n.endswith(SUFFIX)]
    if odd or not named:
        raise UnfitError(f"{file.name} names {odd[:1]}, allowed are {SUFFIX} files next to it")
    return tuple(file.parent / n for n in named)


def read_denoiser(
    kind: type[ModelMixin], files: Sequence[Path], config: Mapping[str, Any], dtype: torch.dtype
) -> nn.Module:
    """Read a frozen network of the class `kind` from its files.

    `config` is that of the network. Weights that the class keeps in single precision are float32, all others `dtype`.
    Raises UnfitError where tensors are missing, left over, of another shape or not finite.
    """
    weights = Weights(tuple(files), "")
    tensors = _named(decoded(read(files), dtype))
    with no_init_weights():  # memory is not touched before the tensors take its place
        network: Any = kind.from_config(dict(config))
    own = network.state_dict()
    if len(own.keys() - tensors.keys()) > FEW * len(own):
        tensors = _renamed(kind, tensors, config, weights)
    refuse(weights, sorted(own.keys() - tensors.keys()), "lacks", "missing")
    refuse(weights, sorted(tensors.keys() - own.keys()), "has", "left over, which this network does not have")
    odd = sorted(n for n, t in tensors.items() if t.shape != own[n].shape)
    refuse(weights, odd, "has another shape of", "of another shape")
    single = set(kind._keep_in_fp32_modules or ())
    kept = {n: t.to(dtype) if single.isdisjoint(n.split(".")) else t.float() for n, t in tensors.items()}
    require_finite(kept, weights)
    network.load_state_dict(kept, assign=True)
    return network.eval().requires_grad_(False)


def read(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return all tensors of some files. Raises UnfitError for a damaged file."""
    found: dict[str, Tensor] = {}
    for file in files:
        header(file)
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    return found


def decoded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return weights with those of 8 bits decoded.

    A weight is its numbers, times the scale next to it where there is one: one number, or one for each row. Raises
    UnfitError for other ways of fewer bits, a scale without a weight, and a weight in float8 that alone has no scale.
    """
    if odd := sorted(n for n in tensors if OTHER_BITS.search(n)):
        raise UnfitError(f"it keeps its weights in 8 bits or fewer, in a way ({odd[0]}) that is not read", BITS_CURE)
    scales = {n.removesuffix(end): (n, t) for n, t in tensors.items() for end in SCALES if n.endswith(end)}
    scaled, bare = bool(scales), list[str]()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALES) or ASIDE.search(name):
            continue
        _, scale = scales.pop(name.removesuffix(".weight"), ("", None)) if name.endswith(".weight") else ("", None)
        if tensor.dtype in CODES:
            said = str(tensor.dtype).removeprefix("torch.")
            raise UnfitError(f"it keeps {name} in {said}, {'with scales' if scaled else 'without a scale'}", BITS_CURE)
        if scale is None:
            bare += [name] if tensor.dtype in FLOATS8 and name.endswith(".weight") and tensor.ndim > 1 else []
            found[name] = tensor.float().to(dtype) if tensor.dtype in FLOATS8 else tensor
            continue
        if scale.numel() not in (1, len(tensor)):
            raise UnfitError(f"{name} has {scale.numel()} scales, which is neither 1 nor one a row", BITS_CURE)
        rows = () if scale.numel() == 1 else (-1, *[1] * (tensor.ndim - 1))
        found[name] = (tensor.float() * scale.float().reshape(rows)).to(dtype)
    if scales:
        name, _ = min(scales.values(), key=lambda one: one[0])
        raise UnfitError(f"it has the scale {name!r}, and no weight that belongs to it", "download it again")
    if scaled and bare:
        raise UnfitError(f"it keeps {min(bare)!r} in float8 without a scale, and others with one", "download it again")
    return found


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without what their names all begin with."""
    start = next((s for s in STARTS if all(n.startswith(s) for n in tensors)), "")
    return {n.removeprefix(start): t for n, t in tensors.items()}


def _renamed(
    kind: type[ModelMixin], tensors: Mapping[str, Tensor], config: Mapping[str, Any], weights: Weights
) -> dict[str, Tensor]:
    """Rename tensors of the original layout to diffusers' names.

    Raises UnfitError where the layout is not known.
    """
    known = SINGLE_FILE_LOADABLE_CLASSES.get(kind.__name__)
    if known is None:
        raise UnfitError(
            f"{weights} is no {kind.__name__} in diffusers' layout, and diffusers knows no other of it",
            "pass it as save_pretrained writes it",
        )
    try:
        found: dict[str, Tensor] = known["checkpoint_mapping_fn"](config=dict(config), checkpoint=dict(tensors))
    except Exception as error:  # what a converter does not find raises another type each
        raise UnfitError(
            f"{weights} is no {kind.__name__} in its original layout ({reason(error)})",
            "pass the pipeline that it belongs to behind @",
        ) from error
    return found
