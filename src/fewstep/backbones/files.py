"""A student's weights as files that diffusers loads."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.loaders import PeftAdapterMixin
from safetensors.torch import load_file
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_NAME

from ..atomic import write_json, write_tensors
from ..reading import reading
from ..tensors import finite, read_tensors
from . import weights
from .experts import PARTS, Experts, experts_of, parted, split_state
from .modules import dtype_of, without_fast_path
from .parts import able_to_single

NETWORK_FILE = "network.safetensors"  # a custom network's state_dict
# LoRA settings that every PEFT knows. Older PEFT refuses a header with later settings, diffusers 0.35 one
# without these.
SETTINGS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
CLIP = "text_model."  # prefix of the names of CLIP's tensors
PEFT_FOLDER = "peft"  # next to a LoRA for which its pipeline has no loader


def part_name(network: nn.Module) -> str:
    """Return the name of the denoiser in pipelines: `unet` or `transformer`."""
    return "unet" if isinstance(network, UNet2DConditionModel | UNet2DModel) else "transformer"


def loads_lora(network: nn.Module) -> bool:
    """Return whether pipelines with this denoiser have `load_lora_weights`."""
    return all(isinstance(part, PeftAdapterMixin) for part in experts_of(network))


def save_lora(
    path: Path,
    network: nn.Module,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    about: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA in diffusers' format.

    The header holds `about` and the LoRA settings of the adapter's `metadata`. For a network whose pipeline
    has no loader, PEFT's own folder is written next to the file. Of a pair, the LoRA of the second network is in a
    file of its own (`second_file`), under the names of the first, as pipelines load it.
    """
    if isinstance(network, Experts):
        for file, own in zip((path, second_file(path)), split_state(state), strict=True):
            layers = sorted({name.rsplit(".lora_", 1)[0] for name in own})
            save_lora(file, network.transformer, own, {**metadata, "target_modules": layers}, about)
        return
    known = {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items() if k in SETTINGS}
    plain = known and {"rank_pattern": {}, "alpha_pattern": {}, **known}
    part = part_name(network)
    settings = json.dumps({f"{part}.{k}": v for k, v in plain.items()})  # as diffusers writes it
    header = {"format": "pt"} | dict(about or {}) | ({"lora_adapter_metadata": settings} if plain else {})
    write_tensors(path, {f"{part}.{k}": v for k, v in state.items()}, header)
    if not loads_lora(network):
        folder = path.parent / PEFT_FOLDER
        write_tensors(folder / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in state.items()})
        write_json(folder / "adapter_config.json", {**plain, "peft_type": "LORA"})


def second_file(path: Path) -> Path:
    """Return where the LoRA of a pair's second network is."""
    return path.with_name(f"{path.stem}_2{path.suffix}")


def save_pipeline(folder: Path, pipe: DiffusionPipeline) -> None:
    """Write a whole pipeline as diffusers saves it.

    transformers 4 and 5.0 to 5.5 read the folder, too. These versions need a tokenizer's `vocab.json` and
    `merges.txt`, and CLIP's tensors under their published names. Tensors of other names would be filled at
    random.
    """
    pipe = parted(pipe)
    pipe.save_pretrained(folder)
    for name, part in pipe.components.items():
        if isinstance(part, CLIPTextModel):
            path = folder / name / SAFE_WEIGHTS_NAME
            tensors = load_file(path)
            write_tensors(
                path, {k if k.startswith(CLIP) else CLIP + k: v for k, v in tensors.items()}, {"format": "pt"}
            )
        if isinstance(part, PreTrainedTokenizerFast) and isinstance(part.backend_tokenizer.model, BPE):
            part.backend_tokenizer.model.save(str(folder / name))


def save_network(folder: Path, network: nn.Module) -> None:
    """Write the whole network of a full student.

    A diffusers network goes to `folder/unet` or `folder/transformer`, a custom network to one safetensors
    file. Raises ValueError where a custom network's state_dict holds anything but tensors.
    """
    if isinstance(network, ModelMixin):
        for place, part in zip(network_places(folder, network), experts_of(network), strict=True):
            part.save_pretrained(place)  # type: ignore[operator]
        return
    state = network.state_dict()
    if odd := next((k for k, v in state.items() if not isinstance(v, Tensor)), None):
        raise ValueError(
            f"student: {odd} of its network is a {type(state[odd]).__name__}, which safetensors does not hold; "
            "make it a buffer"
        )
    # Clones: safetensors refuses tied tensors, which share memory.
    write_tensors(network_places(folder, network)[0], {k: v.detach().cpu().clone() for k, v in state.items()})


def network_places(folder: Path, like: nn.Module) -> list[Path]:
    """Return where `save_network` puts a network of this class.

    Of a pair, where it puts each network.
    """
    if isinstance(like, Experts):
        return [folder / part for part in PARTS]
    return [folder / (part_name(like) if isinstance(like, ModelMixin) else NETWORK_FILE)]


def load_network(folder: Path, like: nn.Module) -> nn.Module:
    """Load what `save_network` wrote, of the class of `like`.

    The network is frozen, with the dtype and device of `like`. Raises ValueError where the file is missing,
    damaged or of another network.
    """
    if isinstance(like, Experts):
        parts = [
            _loaded(place, folder, part)
            for place, part in zip(network_places(folder, like), experts_of(like), strict=True)
        ]
        return Experts(parts[0], parts[1], like.boundary).requires_grad_(False).eval()
    return _loaded(network_places(folder, like)[0], folder, like)


def _loaded(path: Path, folder: Path, like: nn.Module) -> nn.Module:
    """Load one network from `path`. Raises ValueError as `load_network` does."""
    weight = next(like.parameters())
    if isinstance(like, ModelMixin):
        try:
            network: nn.Module = weights.load_network(type(like), path, dtype_of(like), folder)
        except weights.UnfitError as error:
            raise ValueError(
                f"student: {path} is missing or damaged ({error}); {error.cure or 'export the run again'}"
            ) from error
        return able_to_single(network.to(weight.device).requires_grad_(False))
    network = copy.deepcopy(like)
    try:
        with reading(f"student: {path}", "export the run again", "is missing or damaged"):
            tensors = read_tensors(path, {n for n, b in like.named_buffers() if not finite(b)})  # e.g. masks
        network.load_state_dict(tensors)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"student: {path} does not fit this network ({said}); pass the base that it was made from"
        ) from error
    return without_fast_path(network).to(weight.device).requires_grad_(False).eval()  # in the dtypes of `like`
