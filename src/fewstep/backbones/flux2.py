"""FLUX.2: patches of normalised latents, text of a language model.

The text is that of three layers. klein is guided by two halves. dev is told its guidance scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from torch import Tensor, nn

from .base import EMBEDDED, Cond
from .family import ComfyParts, Family
from .flow_transformer import FlowTransformer, pack, places, unpack
from .layouts import Layout
from .parts import on, single_output, transformer_features
from .settings import require_channels, require_flow, same

STEPS = 50  # steps of the teacher, on which the pipeline's shift depends
QWEN_4B = 2560  # width of klein-4B's text encoder
LAYOUT = Layout(  # of the original code; queries, keys and values are one layer in it
    outside={
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    },
    blocks={
        "transformer_blocks": ("double_blocks", {
            "attn.to_q": "img_attn.qkv", "attn.to_k": "img_attn.qkv", "attn.to_v": "img_attn.qkv",
            "attn.add_q_proj": "txt_attn.qkv", "attn.add_k_proj": "txt_attn.qkv", "attn.add_v_proj": "txt_attn.qkv",
            "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
            "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
            "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
        }),
        "single_transformer_blocks": ("single_blocks", {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}),
    },
)  # fmt: skip
SCALE = 4.0  # guidance scale that dev's pipeline tells by default


@dataclass(frozen=True)
class Flux2(FlowTransformer):
    """A `Flux2KleinPipeline` or `Flux2Pipeline` as a backbone.

    States are patches of normalised latents, [4 C, h, w]. The condition is `text [B, L, D]`, and for dev the
    guidance scale.
    """

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder]

    @property
    def patch(self) -> int:
        return 1  # a position of a state is a token

    @property
    def pixels(self) -> int:
        return 2 * int(self.pipe.vae_scale_factor)

    @property
    def time_layer(self) -> str:
        return "time_guidance_embed.timestep_embedder.linear_2"

    @property
    def feature_layers(self) -> tuple[str, ...]:
        # A block returns a pair, text and image. Its feed-forward layer returns one tensor.
        return transformer_features(self.pipe.transformer.transformer_blocks, ".ff")

    def mu(self, tokens: int) -> float:
        return empirical_mu(tokens, STEPS)

    def stock_shift(self, steps: int) -> float:
        return math.exp(empirical_mu(self.tokens, steps))

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text, (height, width) = cond["text"], x.shape[-2:]
        words = torch.zeros(text.shape[1], 4, device=x.device)
        words[:, 3] = torch.arange(text.shape[1], device=x.device)
        with single_output(module):
            tokens = module(
                pack(x, 1).to(text.dtype),
                text,
                t.to(torch.float32),
                places(height, width, 4, x.device),
                words,
                cond.get(EMBEDDED),
                return_dict=False,
            )[0]
        return unpack(tokens, height, width, 1).float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        with torch.no_grad():
            text, _ = self.pipe.encode_prompt(list(prompts), device=self.pipe.text_encoder.device)
        told = {EMBEDDED: torch.full((len(prompts),), SCALE)} if self.embeds_guidance else {}
        return on(self.module, {"text": text, **told})


def empirical_mu(tokens: int, steps: int) -> float:
    """Return the logarithm of FLUX.2's shift.

    Linear in the tokens for 10 and for 200 steps, and between these in the steps; above 4300 tokens the line
    of 200 steps. Source: `compute_empirical_mu` in diffusers, from black-forest-labs/flux2.
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return many + (few - many) * (200 - steps) / 190


def check(pipe: Flux2KleinPipeline | Flux2Pipeline) -> None:
    """Check the settings of a FLUX.2 pipeline. Raises UnfitError."""
    require_flow(pipe)
    require_channels(pipe, pipe.vae.config.latent_channels)
    config = pipe.transformer.config
    same(
        "transformer",
        "out_channels",
        config.out_channels or config.in_channels,
        config.in_channels,
        "states have as many",
    )
    same("transformer", "patch_size", config.patch_size, 1, "its pipeline packs patches by itself")
    same(
        "pipeline", "is_distilled", bool(pipe.config.get("is_distilled")), False,
        "it is a few-step model already", "pass the base model, FLUX.2-klein-base",
    )  # fmt: skip


def klein_parts(pipe: Flux2KleinPipeline) -> ComfyParts:
    """Return the files of klein in ComfyUI.

    The 9B model has the larger text encoder.
    """
    large = pipe.text_encoder.config.hidden_size > QWEN_4B
    encoder = "qwen_3_8b_fp8mixed.safetensors" if large else "qwen_3_4b.safetensors"
    return ComfyParts("EmptyFlux2LatentImage", encoder, "flux2", "flux2-vae.safetensors", shift="")


def dev_parts(pipe: Flux2Pipeline) -> ComfyParts:
    """Return the files of dev in ComfyUI."""
    encoder = "mistral_3_small_flux2_fp8.safetensors"
    return ComfyParts("EmptyFlux2LatentImage", encoder, "flux2", "flux2-vae.safetensors", shift="", told=True)


KLEIN, DEV = (
    Family(
        pipeline,
        Flux2.of,
        told_by="sigmas",
        patch=1,
        check=check,
        original_names=LAYOUT.names,
        writes_original=True,
        comfyui_parts=parts,
    )
    for pipeline, parts in ((Flux2KleinPipeline, klein_parts), (Flux2Pipeline, dev_parts))
)
