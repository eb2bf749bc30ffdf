"""Tiny Stable Diffusion pipelines as artists have them.

The weights are in one file, under the names of the original programs.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from . import pipelines

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = {"layer_norm": "ln_", "self_attn": "attn", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def sd() -> StableDiffusionPipeline:
    """Stable Diffusion 1 in miniature, part for part.

    It predicts noise, has Stable Diffusion's scheduler, and makes 32x32 images from 16x16 latents.
    """
    tokenizer = pipelines.clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=pipelines.autoencoder(0.18215),
        text_encoder=pipelines.clip(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PIPELINES = {"sd": sd, "sd2": sd, "sdxl": pipelines.sdxl}


def save(family: str, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Save a tiny pipeline as a folder and as one file.

    The file is beside the folder. The file's configuration is in a third place, the folder `configs`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = PIPELINES[family]()
    pipe.save_pretrained(folder / "whole")
    shutil.copytree(folder / "whole", folder / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(original(pipe, family), folder / "model.safetensors")
    return folder / "whole", folder / "model.safetensors"


def original(pipe: DiffusionPipeline, family: str) -> dict[str, Tensor]:
    """All weights of a pipeline as the original programs name and shape them."""
    unet = {f"model.diffusion_model.{unet_name(k, pipe.unet)}": v for k, v in pipe.unet.state_dict().items()}
    vae = vae_tensors(pipe.vae.state_dict(), len(pipe.vae.config.block_out_channels))
    text = pipe.text_encoder.state_dict()
    if family == "sd2":
        return contiguous(unet | vae | open_clip(text, "cond_stage_model.model."))
    if family == "sd":
        return contiguous(unet | vae | clip(text, "cond_stage_model.transformer."))
    second = open_clip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    return contiguous(unet | vae | clip(text, "conditioner.embedders.0.transformer.") | second)


def contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone().contiguous() for k, v in state.items()}


def unet_name(name: str, unet: UNet2DConditionModel) -> str:
    """The original name: blocks are counted through all levels, and a level's last one ends in a change of size."""
    per = unet.config.layers_per_block + 1
    if part := next((a for a in ENDS if name.startswith(f"{a}.")), None):
        return ENDS[part] + name.removeprefix(part)
    kind, *rest = name.split(".")
    if kind == "mid_block":
        layer, i, tail = rest[0], int(rest[1]), ".".join(rest[2:])
        return (
            f"middle_block.{1 if layer == 'attentions' else 2 * i}."
            f"{renamed(tail, RESNET) if layer == 'resnets' else tail}"
        )
    level, layer, i, tail = int(rest[0]), rest[1], int(rest[2]), ".".join(rest[3:])
    if layer == "downsamplers":
        return f"input_blocks.{(level + 1) * per}.0.op.{tail.removeprefix('conv.')}"
    if layer == "upsamplers":
        place = 2 if "CrossAttn" in unet.config.up_block_types[level] else 1
        return f"output_blocks.{level * per + per - 1}.{place}.{tail}"
    block = f"input_blocks.{1 + level * per + i}" if kind == "down_blocks" else f"output_blocks.{level * per + i}"
    return f"{block}.1.{tail}" if layer == "attentions" else f"{block}.0.{renamed(tail, RESNET)}"


def renamed(name: str, table: Mapping[str, str]) -> str:
    for a, b in table.items():
        name = name.replace(a, b)
    return name


def vae_tensors(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """An autoencoder; its attention is made of convolutions of 1x1."""
    made = {}
    for name, tensor in state.items():
        if "attentions" in name:
            name = (
                re.sub(r"mid_block\.attentions\.0", "mid.attn_1", name)
                .replace("to_out.0", "proj_out")
                .replace("to_", "")
            )
            name = name.replace("group_norm", "norm")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        made[f"first_stage_model.{name}"] = tensor
    return made


def clip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A text encoder of OpenAI's, under transformers' old names."""
    return {f"{prefix}text_model.{k.removeprefix('text_model.')}": v for k, v in state.items()}


def open_clip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A text encoder of OpenCLIP's: one matrix for queries, keys and values, the projection turned over."""
    made = {}
    for full, tensor in state.items():
        name = full.removeprefix("text_model.")
        if "q_proj" in name:
            together = torch.cat([state[full.replace("q_proj", f"{p}_proj")] for p in "qkv"])
            name, tensor = name.replace("q_proj.", "in_proj_"), together
        if "k_proj" in name or "v_proj" in name:
            continue
        if name.startswith("encoder.layers."):
            name = "transformer.resblocks." + renamed(name.removeprefix("encoder.layers."), OPEN_CLIP)
        name = name.replace("final_layer_norm", "ln_final").replace("embeddings.token_embedding", "token_embedding")
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        made[prefix + name.replace("text_projection.weight", "text_projection")] = (
            tensor.T if name == "text_projection.weight" else tensor
        )
    return made
