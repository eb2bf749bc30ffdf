"""CogVideoX: video latents, v-prediction, zero terminal SNR, a schedule shifted towards noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import CogVideoXPipeline
from torch import Tensor, nn

from .base import Cond
from .family import Family
from .parts import DiffusersBackbone, on, single_output, transformer_features
from .settings import table


@dataclass(frozen=True)
class CogVideoX(DiffusersBackbone):
    """A `CogVideoXPipeline` as a backbone.

    States are scaled latents [T, C, h, w]. The condition is `text [B, L, D]`. `decode` gives videos
    [B, F, 3, H, W] with F = `frames`.
    """

    frames: int

    @property
    def shape(self) -> tuple[int, ...]:
        config = self.pipe.transformer.config
        steps = (self.frames - 1) // self.pipe.vae_scale_factor_temporal + 1
        return (steps, config.in_channels, config.sample_height, config.sample_width)

    @property
    def image_size(self) -> int:
        return 0  # a state is a video

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder]

    @property
    def time_layer(self) -> str:
        return "time_embedding.linear_2"

    @property
    def feature_layers(self) -> tuple[str, ...]:
        # A block returns a pair, video and text. Its feed-forward layer returns one tensor.
        return transformer_features(self.pipe.transformer.transformer_blocks, ".ff")

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text, config, scale = cond["text"], self.pipe.transformer.config, self.pipe.vae_scale_factor_spatial
        place = None
        if config.use_rotary_positional_embeddings:
            place = self.pipe._prepare_rotary_positional_embeddings(
                config.sample_height * scale, config.sample_width * scale, x.shape[1], x.device
            )
        with single_output(module):
            return module(x.to(text.dtype), text, t.to(torch.float32), image_rotary_emb=place, return_dict=False)[
                0
            ].float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        length = self.pipe.transformer.config.max_text_seq_length
        with torch.no_grad():
            text, _ = self.pipe.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                max_sequence_length=length,
                device=self.pipe.text_encoder.device,
            )
        return on(self.module, {"text": text})

    def encode_images(self, images: Tensor) -> Tensor:
        raise ValueError(
            f"data: {self.name} makes videos, which are not learned from images; leave data and method.gan out"
        )

    def decode(self, x: Tensor) -> Tensor:
        vae = self.pipe.vae
        # One video at a time: an autoencoder for video needs more memory than the transformer.
        with torch.no_grad():
            videos = torch.cat([self.pipe.decode_latents(one.to(vae.device, vae.dtype)) for one in x.split(1)])
        return (videos.float() / 2 + 0.5).clamp(0, 1).movedim(1, 2)


FAMILY = Family(
    CogVideoXPipeline,
    lambda pipe, name: CogVideoX(pipe, name, table(pipe), pipe.transformer.config.sample_frames),
    takes_times=False,
    video=True,
    call_options=lambda pipe: {"max_sequence_length": pipe.transformer.config.max_text_seq_length},
)
