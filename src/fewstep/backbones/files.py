"""A student's weights as files that diffusers loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from ..atomic import write_json, write_tensors
from ..tensors import read_tensors
from . import weights
from .parts import able_to_single

LORA_FILE = "pytorch_lora_weights.safetensors"
CONDITION_FILE = "step_condition.safetensors"  # beside a student of several step counts: what tells it the one it takes
PEFT_FOLDER = "peft"  # beside a LoRA that its pipeline has no loader for


def part_name(network: nn.Module) -> str:
    """What pipelines call their denoiser: `unet` or `transformer`."""
    return "unet" if isinstance(network, UNet2DConditionModel | UNet2DModel) else "transformer"


def loads_lora(network: nn.Module) -> bool:
    """Whether a pipeline with this denoiser has `load_lora_weights`."""
    return isinstance(network, PeftAdapterMixin)


def save_lora(folder: Path, network: nn.Module, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """`folder/pytorch_lora_weights.safetensors` in diffusers' format, with the adapter's settings in its header.

    For a network whose pipeline has no loader, PEFT's own folder is written beside it.
    """
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}
    if part_name(network) == "unet":
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=dict(state), unet_lora_adapter_metadata=plain)
    else:
        StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=dict(state), transformer_lora_adapter_metadata=plain)
    if not loads_lora(network):
        write_tensors(folder / PEFT_FOLDER / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in state.items()})
        write_json(folder / PEFT_FOLDER / "adapter_config.json", {**plain, "peft_type": "LORA"})
    return folder / LORA_FILE


def load_lora(folder: Path) -> dict[str, Tensor]:
    """The LoRA of a student folder in PEFT's file format (layer names without the `unet.` or `transformer.` prefix).

    Raises ValueError when the file is missing or damaged.
    """
    path = folder / LORA_FILE
    try:
        state = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"student: {path} is missing or damaged ({error}); export the run again") from error
    return {k.removeprefix("unet.").removeprefix("transformer."): v for k, v in state.items()}


def save_network(folder: Path, network: nn.Module) -> None:
    """A full student: the whole network in diffusers' format, in `folder/unet` or `folder/transformer`."""
    network.save_pretrained(folder / part_name(network))  # type: ignore[operator]


def load_network(folder: Path, like: nn.Module) -> nn.Module:
    """The whole network of a full student, of the class of `like`. Raises ValueError when it is missing or damaged."""
    path = folder / part_name(like)
    weight = next(like.parameters())
    try:
        network: nn.Module = weights.load_network(type(like), path, weight.dtype, folder)
    except weights.UnfitError as error:
        raise ValueError(f"student: {path} is missing or damaged ({error}); {error.cure or 'export the run again'}") from error
    return able_to_single(network.to(weight.device).requires_grad_(False))


def save_vectors(folder: Path, vectors: Mapping[float, Tensor]) -> None:
    """One vector per step count or guidance scale."""
    write_tensors(folder / CONDITION_FILE, {f"{k:g}": v.float() for k, v in vectors.items()})


def load_vectors(folder: Path) -> dict[float, Tensor]:
    """Inverse of `save_vectors`. Raises ValueError when the file is missing or damaged."""
    try:
        return {float(k): v for k, v in read_tensors(folder / CONDITION_FILE).items()}
    except ValueError as error:
        raise ValueError(f"student: {folder / CONDITION_FILE} is missing or damaged ({error}); export the run again") from error
