"""FLUX.1: packed latents, CLIP's pooled text, T5 text.

dev is told its guidance scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from .base import EMBEDDED, Cond
from .family import ComfyParts, Family
from .flow_transformer import FlowTransformer, pack, places, unpack
from .layouts import Layout
from .parts import embeds_guidance, on, single_output, transformer_features
from .settings import require_channels, require_flow, same

LAYOUT = Layout(  # of the original code; queries, keys and values are one layer in it, in single blocks with the MLP
    outside={
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    },
    blocks={
        "transformer_blocks": ("double_blocks", {
            "attn.to_q": "img_attn.qkv", "attn.to_k": "img_attn.qkv", "attn.to_v": "img_attn.qkv",
            "attn.add_q_proj": "txt_attn.qkv", "attn.add_k_proj": "txt_attn.qkv", "attn.add_v_proj": "txt_attn.qkv",
            "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
            "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
            "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
            "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
        }),
        "single_transformer_blocks": ("single_blocks", {
            "attn.to_q": "linear1", "attn.to_k": "linear1", "attn.to_v": "linear1", "proj_mlp": "linear1",
            "proj_out": "linear2", "norm.linear": "modulation.lin",
        }),
    },
)  # fmt: skip
SCALE = 3.5  # guidance scale that the pipeline tells by default


@dataclass(frozen=True)
class Flux(FlowTransformer):
    """A `FluxPipeline` as a backbone.

    States are scaled latents [C, h, w]. The condition is `text [B, L, D]`, `pooled [B, P]`, and the guidance
    scale where the network is told one.
    """

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder, self.pipe.text_encoder_2]

    @property
    def time_layer(self) -> str:
        return "time_text_embed.timestep_embedder.linear_2"

    @property
    def feature_layers(self) -> tuple[str, ...]:
        # A block returns a pair, text and image. Its feed-forward layer returns one tensor.
        return transformer_features(self.pipe.transformer.transformer_blocks, ".ff")

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text, (height, width) = cond["text"], x.shape[-2:]
        with single_output(module):
            tokens = module(
                pack(x).to(text.dtype),
                text,
                cond["pooled"],
                t.to(torch.float32),
                places(height // 2, width // 2, 3, x.device),
                torch.zeros(text.shape[1], 3, device=x.device),
                cond.get(EMBEDDED),
                return_dict=False,
            )[0]
        return unpack(tokens, height, width).float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        with torch.no_grad():
            text, pooled, _ = self.pipe.encode_prompt(list(prompts), device=self.pipe.text_encoder.device)
        told = {EMBEDDED: torch.full((len(prompts),), SCALE)} if self.embeds_guidance else {}
        return on(self.module, {"text": text, "pooled": pooled, **told})


def check(pipe: FluxPipeline) -> None:
    """Check the settings of a FLUX.1 pipeline. Raises UnfitError."""
    require_flow(pipe)
    require_channels(pipe, pipe.vae.config.latent_channels)
    config = pipe.transformer.config
    same("transformer", "patch_size", config.patch_size, 1, "its pipeline packs patches by itself")
    same(
        "transformer",
        "out_channels",
        config.out_channels or config.in_channels,
        config.in_channels,
        "states have as many",
    )


FAMILY = Family(
    FluxPipeline,
    Flux.of,
    told_by="sigmas",
    latents=pack,
    patch=2,
    check=check,
    original_names=LAYOUT.names,
    comfyui_parts=lambda pipe: ComfyParts(
        "EmptySD3LatentImage",
        "clip_l.safetensors",
        "flux",
        "ae.safetensors",
        second_encoder="t5xxl_fp16.safetensors",
        shift="",
        told=embeds_guidance(pipe.transformer),
    ),
)
