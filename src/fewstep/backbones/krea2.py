"""Krea 2: one stream of packed latents and masked text.

The text is that of several layers of a language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import Krea2Pipeline
from torch import Tensor, nn

from .base import Cond
from .family import ComfyParts, Family
from .flow_transformer import FlowTransformer, pack, places, unpack
from .layouts import Layout
from .parts import on, single_output, transformer_features
from .settings import require_channels, require_flow, same

BLOCK = {
    "attn.to_q": "attn.wq", "attn.to_k": "attn.wk", "attn.to_v": "attn.wv", "attn.to_out.0": "attn.wo",
    "attn.to_gate": "attn.gate", "ff.gate": "mlp.gate", "ff.up": "mlp.up", "ff.down": "mlp.down",
}  # fmt: skip
LAYOUT = Layout(  # of the original code
    outside={
        "img_in": "first", "final_layer.linear": "last.linear", "time_mod_proj": "tproj.1",
        "time_embed.linear_1": "tmlp.0", "time_embed.linear_2": "tmlp.2",
        "txt_in.linear_1": "txtmlp.1", "txt_in.linear_2": "txtmlp.3", "text_fusion.projector": "txtfusion.projector",
    },
    blocks={"transformer_blocks": ("blocks", BLOCK)} | {
        f"text_fusion.{name}": (f"txtfusion.{name}", BLOCK) for name in ("layerwise_blocks", "refiner_blocks")
    },
)  # fmt: skip


@dataclass(frozen=True)
class Krea2(FlowTransformer):
    """A `Krea2Pipeline` as a backbone.

    States are normalised latents [C, h, w]. The condition is `text [B, L, layers, D]` with `mask [B, L]`.
    """

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder]

    @property
    def time_layer(self) -> str:
        return "time_embed.linear_2"

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return transformer_features(self.pipe.transformer.transformer_blocks)

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text, (height, width) = cond["text"], x.shape[-2:]
        ids = torch.cat([torch.zeros(text.shape[1], 3, device=x.device), places(height // 2, width // 2, 3, x.device)])
        with single_output(module):
            tokens = module(pack(x).to(text.dtype), text, t.to(torch.float32), ids, cond["mask"], return_dict=False)[0]
        return unpack(tokens, height, width).float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        with torch.no_grad():
            text, mask = self.pipe.encode_prompt(list(prompts), device=self.pipe.text_encoder.device)
        return on(self.module, {"text": text, "mask": mask})


def check(pipe: Krea2Pipeline) -> None:
    """Check the settings of a Krea 2 pipeline. Raises UnfitError."""
    require_flow(pipe)
    require_channels(pipe, pipe.vae.config.z_dim)
    layers = list(pipe.config.text_encoder_select_layers)
    told = f"its pipeline takes {len(layers)} layers of the text encoder"
    same("transformer", "num_text_layers", pipe.transformer.config.num_text_layers, len(layers), told)
    same("pipeline", "patch_size", pipe.config.patch_size, 2, "fewstep packs patches of 2", "pass Krea-2-Raw")
    same(
        "pipeline", "is_distilled", bool(pipe.config.is_distilled), False,
        "it is a few-step model already", "pass the base model, Krea-2-Raw",
    )  # fmt: skip


FAMILY = Family(
    Krea2Pipeline,
    Krea2.of,
    told_by="sigmas",
    guidance=lambda scale, count: {"guidance_scale": scale - 1},  # cond + g (cond - null)
    latents=pack,
    patch=2,
    check=check,
    original_names=LAYOUT.names,
    comfyui_parts=lambda pipe: ComfyParts(
        "EmptySD3LatentImage", "qwen3vl_4b_fp8_scaled.safetensors", "krea2", "qwen_image_vae.safetensors", shift=""
    ),
)
