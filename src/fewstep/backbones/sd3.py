"""Stable Diffusion 3: rectified flow with shifted times.

Two CLIP texts and a T5 text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from .base import Cond
from .family import Family
from .layouts import Layout
from .parts import LatentTransformer, on, single_output, transformer_features
from .settings import flow

LAYOUT = Layout(  # of the original code; queries, keys and values are one layer in it
    outside={
        "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder", "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    },
    blocks={"transformer_blocks": ("joint_blocks", {
        "attn.to_q": "x_block.attn.qkv", "attn.to_k": "x_block.attn.qkv", "attn.to_v": "x_block.attn.qkv",
        "attn2.to_q": "x_block.attn2.qkv", "attn2.to_k": "x_block.attn2.qkv", "attn2.to_v": "x_block.attn2.qkv",
        "attn.add_q_proj": "context_block.attn.qkv", "attn.add_k_proj": "context_block.attn.qkv",
        "attn.add_v_proj": "context_block.attn.qkv",
        "attn.to_out.0": "x_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    })},
)  # fmt: skip


@dataclass(frozen=True)
class StableDiffusion3(LatentTransformer):
    """A `StableDiffusion3Pipeline` as a backbone.

    States are scaled latents [C, h, w]. The condition is `text [B, L, D]` and `pooled [B, P]`.
    """

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [
            e for e in (self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3) if e is not None
        ]

    @property
    def time_layer(self) -> str:
        return "time_text_embed.timestep_embedder.linear_2"

    @property
    def largest(self) -> int:
        return int(self.pipe.transformer.config.pos_embed_max_size) * self.multiple

    @property
    def feature_layers(self) -> tuple[str, ...]:
        # A block returns a pair, text and image. Its feed-forward layer returns one tensor.
        return transformer_features(self.pipe.transformer.transformer_blocks, ".ff")

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        times = t.to(torch.float32) * self.pipe.scheduler.config.num_train_timesteps
        with single_output(module):
            return module(x.to(cond["text"].dtype), cond["text"], cond["pooled"], times, return_dict=False)[0].float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        with torch.no_grad():
            text, _, pooled, _ = self.pipe.encode_prompt(
                list(prompts), None, None, device=self.encoders[0].device, do_classifier_free_guidance=False
            )
        return on(self.module, {"text": text, "pooled": pooled})


FAMILY = Family(
    StableDiffusion3Pipeline,
    lambda pipe, name: StableDiffusion3(pipe, name, flow(pipe)),
    told_by="sigmas",
    original_names=LAYOUT.names,
    comfyui_latent="EmptySD3LatentImage",
)
