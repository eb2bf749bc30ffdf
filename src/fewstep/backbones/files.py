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
from ..tensors import read_tensors
from . import weights
from .parts import able_to_single

NETWORK_FILE = "network.safetensors"  # a network of one's own: its state_dict
# Of a LoRA: what every PEFT knows; older ones refuse a header with settings that came later, diffusers 0.35 one without these.
SETTINGS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
CLIP = "text_model."  # how the names of CLIP's tensors begin
PEFT_FOLDER = "peft"  # beside a LoRA that its pipeline has no loader for


def part_name(network: nn.Module) -> str:
    """What pipelines call their denoiser: `unet` or `transformer`."""
    return "unet" if isinstance(network, UNet2DConditionModel | UNet2DModel) else "transformer"


def loads_lora(network: nn.Module) -> bool:
    """Whether a pipeline with this denoiser has `load_lora_weights`."""
    return isinstance(network, PeftAdapterMixin)


def save_lora(
    path: Path, network: nn.Module, state: Mapping[str, Tensor], metadata: Mapping[str, Any], about: Mapping[str, str] | None = None
) -> None:
    """Write a LoRA in diffusers' format, with what the adapter's settings say of a LoRA, and `about`, in its header.

    For a network whose pipeline has no loader, PEFT's own folder is written next to it.
    """
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


def save_pipeline(folder: Path, pipe: DiffusionPipeline) -> None:
    """A whole pipeline as diffusers saves it, and as transformers 4 and 5.0 to 5.5 read it, too.

    Those want a tokenizer's `vocab.json` and `merges.txt`, and CLIP's tensors under the names of its published files: others they fill at random.
    """
    pipe.save_pretrained(folder)
    for name, part in pipe.components.items():
        if isinstance(part, CLIPTextModel):
            path = folder / name / SAFE_WEIGHTS_NAME
            tensors = load_file(path)
            write_tensors(path, {k if k.startswith(CLIP) else CLIP + k: v for k, v in tensors.items()}, {"format": "pt"})
        if isinstance(part, PreTrainedTokenizerFast) and isinstance(part.backend_tokenizer.model, BPE):
            part.backend_tokenizer.model.save(str(folder / name))


def save_network(folder: Path, network: nn.Module) -> None:
    """A full student: the whole network in diffusers' format, in `folder/unet` or `folder/transformer`; one of one's own in one file."""
    if isinstance(network, ModelMixin):
        network.save_pretrained(network_place(folder, network))
        return
    state = network.state_dict()
    if odd := next((k for k, v in state.items() if not isinstance(v, Tensor)), None):
        raise ValueError(
            f"student: {odd} of its network is a {type(state[odd]).__name__}, which safetensors does not hold; make it a buffer"
        )
    write_tensors(
        network_place(folder, network), {k: v.detach().cpu().clone() for k, v in state.items()}
    )  # a clone each: tied ones share memory


def network_place(folder: Path, like: nn.Module) -> Path:
    """Return where `save_network` puts a network of the class of `like`."""
    return folder / (part_name(like) if isinstance(like, ModelMixin) else NETWORK_FILE)


def load_network(folder: Path, like: nn.Module) -> nn.Module:
    """Load what `save_network` wrote, of the class of `like`. Raises ValueError when it is missing, damaged or another's."""
    path = network_place(folder, like)
    weight = next(like.parameters())
    if isinstance(like, ModelMixin):
        try:
            network: nn.Module = weights.load_network(type(like), path, weight.dtype, folder)
        except weights.UnfitError as error:
            raise ValueError(f"student: {path} is missing or damaged ({error}); {error.cure or 'export the run again'}") from error
        return able_to_single(network.to(weight.device).requires_grad_(False))
    network = copy.deepcopy(like)
    try:
        with reading(f"student: {path}", "export the run again", "is missing or damaged"):
            tensors = read_tensors(path)
        network.load_state_dict(tensors)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"student: {path} does not fit this network ({said}); pass the base that it was made from") from error
    return network.to(weight.device).requires_grad_(False).eval()  # of the types that `like` has
