"""Fusing LoRAs into a pipeline's weights: all of a file, or nothing.

The layers may have the names of diffusers, PEFT, kohya or the original programs. A layer of the original programs may
be several here, such as queries, keys and values: each takes its rows. Each weight becomes
`W + strength alpha / r B A`, computed in single precision. What is no plain LoRA, and what does not belong to
the model, is refused by name: libraries drop such tensors with a line in a log.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

from ..reading import json_in, json_of, reason, require_regular
from ..tensors import finite, read_tensors, require_floating
from ..typed import typed
from .experts import PARTS
from .families import family_of_pipeline
from .layouts import shift_first
from .weights import PICKLES

USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # libraries' names for a LoRA in its folder
ADAPTER = "adapter_config.json"  # PEFT's settings next to a LoRA
KEY = re.compile(  # a tensor's layer and role, in the files of all programs
    r"^(?P<layer>.*?)(?:\.processor)?(?P<old>\.to_(?:q|k|v|out)_lora)?"
    r"\.(?P<role>lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up|lora_linear_layer\.down|"
    r"lora_linear_layer\.up|down|up|alpha)"
    r"(?:\.(?!weight$)\w+)?(?P<weight>\.weight)?$"
)
DOWN = ("lora_down", "lora_A", "lora.down", "lora_linear_layer.down", "down")
DENOISERS = ("unet", "transformer", PARTS[1])  # what pipelines call the network that is distilled
OTHERS = {  # patterns of tensor names, and what files with such tensors hold
    r"hada_w|hada_t": "LoHa, products of two LoRAs",
    r"lokr_": "LoKr, Kronecker products",
    r"dora_scale|lora_magnitude_vector": "DoRA, a LoRA with magnitudes",
    r"lora_mid": "a LoRA of three factors (Tucker)",
    r"\.diff(_b)?$|\.(w|b)_norm$|\.set_weight$": "whole differences of weights",
    r"oft_|boft": "OFT, rotations",
    r"on_input|ia3": "IA3, factors of activations",
    r"\.(a1|a2|b1|b2|bm)\.weight$": "GLoRA",
    r"lora_[AB]\.(default\.)?bias$|lora_(up|down)\.bias$": "a LoRA with biases",
    r"lora_embedding": "a LoRA of embeddings",
    r"bundle_emb|emb_params|string_to_param|^clip_[lg]$": "embeddings of new words",
}


class Facts(NamedTuple):
    """A LoRA as it was read.

    `alpha` maps the name of a pipeline's part to an alpha; the empty name stands for all parts. `alphas` maps
    patterns of layer names to alphas. Both come from the file's header or from PEFT's settings.
    """

    tensors: dict[str, Tensor]
    alpha: Mapping[str, float]
    alphas: Mapping[str, float]
    root: bool  # rank-stabilised: alpha / sqrt(r)


@dataclass
class Factors:
    """What a file has for one layer."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    names: list[str] = field(default_factory=list)


class Target(NamedTuple):
    """A layer of a pipeline.

    `part` is the pipeline's name for the network with this layer.
    """

    part: str
    name: str
    layer: nn.Linear | nn.Conv2d


class Place(NamedTuple):
    """Where a name in a file belongs.

    It has the rows of these layers, in turn. Of a `swapped` layer, the file has the second half of the rows first.
    """

    targets: tuple[Target, ...]
    swapped: bool = False


def fuse(pipe: DiffusionPipeline, lora: str, strength: float) -> int:
    """Add a LoRA to a pipeline's own weights.

    Returns how many layers changed. Raises ValueError with one line, and changes nothing, where any of the
    LoRA cannot be used.
    """
    changes = changes_of(pipe, lora, strength)
    with torch.no_grad():
        for target, change in changes:
            weight = target.layer.weight
            weight.copy_((weight.float() + change.to(weight.device)).to(weight.dtype))
    return len(changes)


def changes_of(pipe: DiffusionPipeline, lora: str, strength: float) -> list[tuple[Target, Tensor]]:
    """Return what `fuse` would add to which layers.

    Of the pipeline's own weights, only the shapes are read. Raises ValueError as `fuse` does.
    """
    if not isinstance(pipe, LoraBaseMixin):
        raise ValueError(f"--fuse-lora: diffusers loads no LoRA into a {type(pipe).__name__}; leave it out")
    try:
        return list(differences(pipe, read_lora(lora), strength, denoiser_for(pipe, lora)))
    except LoraError as error:
        raise ValueError(
            f"--fuse-lora: {lora} cannot be fused into this teacher ({error}); "
            f"{error.cure or 'check the file and what it was made for'}"
        ) from error


class LoraError(ValueError):
    """Why a LoRA cannot be used, in one line.

    `cure` is set where something else helps than checking the file.
    """

    def __init__(self, what: str, cure: str = "") -> None:
        super().__init__(what)
        self.cure = cure


def denoiser_for(pipe: DiffusionPipeline, lora: str) -> str:
    """Return the network that layers without a prefix belong to.

    Of two networks, a file says the one by `high` or `low` in its name. Raises LoraError where it says neither.
    """
    own = [part for part in DENOISERS if pipe.components.get(part) is not None]
    if PARTS[1] not in own:
        return own[0]
    second = second_of_pair(lora)
    if second is None:
        raise LoraError(
            "this model has two networks, and its name does not say for which it is",
            "rename it so that it has high_noise or low_noise in its name",
        )
    return PARTS[second]


def second_of_pair(lora: str) -> bool | None:
    """Return whether a file's name says that it is for low noise.

    None where it says neither high nor low, or both.
    """
    said = set(re.findall(r"(?<![a-z])(high|low)(?![a-z])", Path(lora).name.lower()))
    return said == {"low"} if len(said) == 1 else None


def differences(
    pipe: DiffusionPipeline, facts: Facts, strength: float, denoiser: str
) -> Iterator[tuple[Target, Tensor]]:
    """Yield the layers that a LoRA changes, with their differences in float32.

    `denoiser` is the network that layers without a prefix belong to.

    Raises LoraError where a tensor has no place in the pipeline, where two names mean one layer, where a
    difference is not finite, and where all are zero.
    """
    moved = 0
    for layer, factors, target in targets_of(pipe, facts, denoiser):
        change = strength * difference(layer, factors, target, facts)
        if not finite(change):
            raise LoraError(f"what it adds to {layer!r} is not finite")
        moved += bool(change.any())
        yield target, change
    if not moved:
        raise LoraError("it changes no weight: all of it is zero", "train it, or leave it out")


def targets_of(pipe: DiffusionPipeline, facts: Facts, denoiser: str) -> Iterator[tuple[str, Factors, Target]]:
    """Yield what a LoRA has for each layer.

    With the layer's name in the file, and the layer in the pipeline.
    Raises LoraError where a tensor has no place in the pipeline, and where two names mean one layer.
    """
    places, layers = places_in(pipe), factors_of(facts)
    if unknown := [layer for layer in layers if _place(layer, places, denoiser) is None]:
        own = ", ".join(sorted({t.part for place in places.values() for t in place.targets}))
        raise LoraError(
            f"{len(unknown)} of its {len(layers)} layers are not there in this {type(pipe).__name__} ({own}), "
            f"the first is {unknown[0]!r}",
            "pass a LoRA that was made for this kind of model",
        )
    seen: dict[Target, str] = {}
    for layer, factors in layers.items():
        place = _place(layer, places, denoiser)
        assert place is not None
        for target, own_factors in _portions(layer, factors, place):
            if target in seen:
                raise LoraError(f"{layer!r} and {seen[target]!r} are the same layer")
            seen[target] = layer
            yield layer, own_factors, target


def _portions(layer: str, factors: Factors, place: Place) -> Iterator[tuple[Target, Factors]]:
    """Yield each layer of a place with its rows of the factors.

    Raises LoraError where there are more or fewer rows.
    """
    up, counts = factors.up, [len(t.layer.weight) for t in place.targets]
    if up is None or (len(counts) == 1 and not place.swapped):
        yield place.targets[0], factors
        return
    if up.ndim < 2 or len(up) != sum(counts):
        raise LoraError(
            f"{layer!r} has a factor of {list(up.shape)}, the layer here has {sum(counts)} rows",
            "pass a LoRA that was made for this kind of model",
        )
    rows = torch.cat(up.chunk(2)[::-1]) if place.swapped else up
    for target, portion in zip(place.targets, rows.split(counts), strict=True):
        yield target, replace(factors, up=portion)


def difference(layer: str, factors: Factors, target: Target, facts: Facts) -> Tensor:
    """Return `alpha / r B A`, shaped as a layer's weight.

    Raises LoraError as `low_rank` does.
    """
    scale, up, down = low_rank(layer, factors, target, facts)
    return scale * (up @ down).reshape(target.layer.weight.shape)


def low_rank(layer: str, factors: Factors, target: Target, facts: Facts) -> tuple[float, Tensor, Tensor]:
    """Return scale and factors of a layer, in float32.

    These are `(alpha / r, B [out, r], A [r, in])`. The `in` of a convolution is the number of inputs of
    its kernel. A rank-stabilised LoRA has `alpha / sqrt(r)` in place of `alpha / r`. Raises LoraError
    where the factors do not fit the layer.
    """
    down, up, weight = factors.down, factors.up, target.layer.weight
    if down is None or up is None:
        raise LoraError(f"{layer!r} has half of a LoRA alone ({', '.join(factors.names)})")
    rank = down.shape[0] if down.ndim > 1 else 0
    fits = rank > 0 and up.numel() == rank * weight.shape[0] and up.shape[:2] == (weight.shape[0], rank)
    # A file may store a linear layer as a convolution of 1x1, and the other way round.
    kernel = weight.shape[1:] + (1,) * (4 - weight.ndim)
    if not fits or down.shape[1:] + (1,) * (4 - down.ndim) != kernel:
        raise LoraError(
            f"{layer!r} has factors of {list(down.shape)} and {list(up.shape)}, the layer here is {list(weight.shape)}",
            "pass a LoRA that was made for this kind of model",
        )
    alpha = factors.alpha if factors.alpha is not None else _alpha(target, facts, rank)
    scale = alpha / (math.sqrt(rank) if facts.root else rank)
    return scale, up.float().reshape(-1, rank), down.float().reshape(rank, -1)


def _alpha(target: Target, facts: Facts, rank: int) -> float:
    """Return the alpha of a layer that has none of its own.

    The first that is set of: PEFT's pattern for the layer, the alpha of the layer's part, the alpha of all
    parts, the rank.
    """
    name = f"{target.part}.{target.name}"
    for pattern, alpha in facts.alphas.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return alpha
    own = (target.part, *PARTS[:1] * (target.part == PARTS[1]), "")  # files of a second network call it as the first
    return next((facts.alpha[part] for part in own if part in facts.alpha), float(rank))


def factors_of(facts: Facts) -> dict[str, Factors]:
    """Group a LoRA's tensors by layer, under the file's own names.

    Raises LoraError for what is no plain LoRA.
    """
    layers: dict[str, Factors] = {}
    for kind, what in OTHERS.items():
        if found := sorted(n for n in facts.tensors if re.search(kind, n)):
            raise LoraError(
                f"it holds {what}: {found[0]!r} and {len(found) - 1} more",
                "pass a plain LoRA, or merge it in the program that made it",
            )
    for name, tensor in facts.tensors.items():
        match = KEY.match(name)
        if match is None or (match["role"] != "alpha" and match["weight"] is None):
            raise LoraError(f"{name!r} is no tensor of a LoRA", "pass a plain LoRA")
        old = (
            "" if match["old"] is None else ".to_out.0" if "out" in match["old"] else match["old"].removesuffix("_lora")
        )
        factors = layers.setdefault(match["layer"] + old, Factors())
        factors.names.append(name)
        if match["role"] == "alpha":
            if tensor.numel() != 1:
                raise LoraError(f"{name!r} is no number")
            factors.alpha = float(tensor)
        elif match["role"] in DOWN:
            factors.down = tensor
        else:
            factors.up = tensor
    if not layers:
        raise LoraError("it is empty")
    return layers


def places_in(pipe: DiffusionPipeline) -> dict[tuple[str, str], Place]:
    """Return the layers that a LoRA may change.

    The keys are (part, layer name with `_` for dots), in diffusers' names and in the original ones.
    """
    places: dict[tuple[str, str], Place] = {}
    family = family_of_pipeline(pipe)
    for part, network in pipe.components.items():
        if not isinstance(network, nn.Module) or part in ("vae", "safety_checker", "image_encoder"):
            continue
        layers = {
            n.removesuffix(".base_layer"): m  # of a layer that carries adapters
            for n, m in network.named_modules()
            if isinstance(m, nn.Linear | nn.Conv2d) and ".lora_" not in n
        }
        for name, layer in layers.items():
            target = Target(part, name, layer)
            bare = name.removeprefix("text_model.")
            for known in {name, bare, f"text_model.{bare}"} if part.startswith("text_encoder") else {name}:
                places[part, flat(known)] = Place((target,))
        if part in DENOISERS:
            swapped, together = shift_first(network), dict[str, list[str]]()
            for name, original in family.original_names(network):
                if name in layers:  # a module around a layer may have the layer's original name too, and is none
                    together.setdefault(original, []).append(name)
            for original, names in together.items():
                targets = tuple(Target(part, name, layers[name]) for name in names)
                places.setdefault((part, flat(original)), Place(targets, names[0] in swapped))
    return places


def flat(name: str) -> str:
    """Replace the dots of a name by underscores."""
    return name.replace(".", "_")


def _place(layer: str, places: Mapping[tuple[str, str], Place], denoiser: str) -> Place | None:
    """Return the layers that a file's name means, or None."""
    layer = layer.removeprefix("base_model.model.")
    starts = (
        ("lora_unet_", denoiser), ("lora_transformer_", denoiser), ("lycoris_", denoiser),
        ("lora_te_", "text_encoder"), ("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2"),
        ("lora_te3_", "text_encoder_3"), ("lora_te3_", "text_encoder_2"),  # kohya's scripts call FLUX.1's T5 the third
        ("text_encoder.", "text_encoder"), ("text_encoder_2.", "text_encoder_2"), ("text_encoder_3.", "text_encoder_3"),
        ("unet.", denoiser), ("transformer.", denoiser), (f"{PARTS[1]}.", PARTS[1]), ("diffusion_model.", denoiser),
        ("", denoiser),
    )  # fmt: skip
    found = ((part, flat(layer.removeprefix(start))) for start, part in starts if layer.startswith(start))
    return next((places[key] for key in found if key in places), None)


def read_lora(place: str) -> Facts:
    """Read a LoRA from a file, a folder or a hub id.

    Raises LoraError.
    """
    file = lora_file(place)
    try:
        tensors = read_tensors(file)
        require_floating({n: t for n, t in tensors.items() if not n.endswith("alpha")})
        if odd := next((n for n, t in tensors.items() if t.dtype == torch.bool), None):
            raise LoraError(f"its {odd} holds truth values, not numbers", "write the file again")
        with safe_open(require_regular(file), "pt") as opened:
            said = typed(dict[str, Any], json_of((opened.metadata() or {}).get("lora_adapter_metadata", "{}")))
        beside = file.with_name(ADAPTER)
        if not said and beside.is_file() and file.name == "adapter_model.safetensors":
            said = json_in(beside)
        return _facts(tensors, said)
    except LoraError:
        raise
    except Exception as error:  # each kind of damage raises another type
        raise LoraError(reason(error)) from error


def _facts(tensors: dict[str, Tensor], said: Mapping[str, Any]) -> Facts:
    """Return `Facts` of tensors and PEFT's settings `said`.

    In diffusers' headers, the name of a part stands before each setting.
    """
    alpha, alphas, root = dict[str, float](), dict[str, float](), False
    for key, value in said.items():
        part, _, setting = key.rpartition(".")
        if setting == "lora_alpha":
            alpha[part] = typed(float, value, key)
        elif setting == "alpha_pattern":
            alphas |= {_pattern(k, key): v for k, v in (typed(dict[str, float] | None, value, key) or {}).items()}
        elif setting == "use_rslora":
            root = bool(typed(bool | None, value, key)) or root
        elif setting == "use_dora" and typed(bool | None, value, key):
            raise LoraError("it is DoRA, a LoRA with magnitudes", "pass a plain LoRA")
    return Facts(tensors, alpha, alphas, root)


def _pattern(text: str, key: str) -> str:
    """Return a regular expression.

    Raises ValueError for a text that is none.
    """
    try:
        return re.compile(text).pattern
    except re.error as error:
        raise ValueError(f"{key} has {text!r}, which is no pattern") from error


def lora_file(place: str) -> Path:
    """Find the file of a LoRA.

    `place` is the file, a folder with the file, or a hub id. Raises LoraError.
    """
    path = Path(place).expanduser()
    if path.suffix in PICKLES:
        raise LoraError("it is a pickle, which may run any code when it is read", "pass it as .safetensors")
    if path.suffix == ".safetensors" and not path.is_dir():
        return path
    if not path.is_dir():
        if place.count("/") != 1 or place.startswith((".", "/", "~")):
            raise LoraError("there is no such file or folder", "pass a .safetensors file, a folder or a hub id")
        try:
            path = Path(snapshot_download(place, allow_patterns=["*.safetensors", ADAPTER]))
        except Exception as error:  # the hub raises a different type for each kind of trouble
            raise LoraError(
                f"it is not to be had from the hub: {reason(error)}", "pass a .safetensors file or a folder"
            ) from error
    found = sorted(path.glob("*.safetensors"))
    usual = [path / name for name in USUAL if path / name in found]
    if not usual and len(found) != 1:
        names = ", ".join(f.name for f in found[:8]) or "none"
        raise LoraError(
            f"its .safetensors files are {names}, of which none is called {' or '.join(USUAL)}", "pass the file itself"
        )
    return (usual or found)[0]
