"""Qwen-Image-2.1: one sequence of masked text and of latents.

Text looks back alone, and takes part at time 0. Images have an alpha channel.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import diffusers
import torch
import transformers
from diffusers import QwenImage21Pipeline
from torch import Tensor, nn
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from ..atomic import write_text
from ..reading import json_of, text_in
from .base import Cond
from .family import ComfyParts, Family
from .flow_transformer import TEXT, FlowTransformer, pack, unpack
from .layouts import Layout
from .parts import on, single_output, transformer_features
from .qwenimage import BLANK
from .settings import require_channels, require_flow, require_rows, same
from .weights import UnfitError

LAYOUT = Layout(  # of ComfyUI, in which two layers are one
    blocks={
        "transformer_blocks": (
            "transformer_blocks", {"img_mlp.gate_layer": "img_mlp.gate_up", "img_mlp.proj": "img_mlp.gate_up"},
        )
    }
)  # fmt: skip
TEMPLATE = "chat_template.json"  # of older folders; later ones keep the tokenizer's
MARK = "<|image_pad|>"  # which the pipeline looks for
MOST_PLACES = 2048  # along a side: diffusers has rotations for 1024 places before 0
# Files of a processor of which the tokenizer's are a part.
WHOLE = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", TEMPLATE)


class Rotations(NamedTuple):
    """Rotary embeddings of each sample.

    They are in the place of diffusers', which all samples share. `turns` [B, S, D / 2] are complex numbers. diffusers
    asks for `unsqueeze` alone, to add the heads.
    """

    turns: Tensor

    def unsqueeze(self, _: int) -> Tensor:
        """Return the rotations for all heads, [B, S, 1, D / 2]."""
        return self.turns.unsqueeze(2)


class QwenImage21Transformer2DModel(diffusers.QwenImage21Transformer2DModel):
    """The network of diffusers, for prompts of unlike length.

    Where there is a mask of text and one image: where the image begins follows from shapes, and its place in time from
    each prompt's own length. Padding then changes nothing. Other calls, and those without padding, are diffusers' own.
    """

    __module__ = diffusers.QwenImage21Transformer2DModel.__module__  # files name the class of diffusers

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_shapes: list[list[tuple[int, int, int]]],
        img_mask: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        return_dict: bool = True,
    ) -> Any:
        if encoder_hidden_states_mask is None or len(img_shapes[0]) > 1:
            return super().forward(
                hidden_states, encoder_hidden_states, timestep, img_shapes, img_mask, encoder_hidden_states_mask,
                attention_kwargs, kv_cache, kv_cache_mode, return_dict,
            )  # fmt: skip
        mask, words = encoder_hidden_states_mask.bool(), encoder_hidden_states.shape[1]
        x = torch.cat([self.txt_in(encoder_hidden_states), self.img_in(hidden_states)], 1)
        drawn = torch.arange(x.shape[1], device=x.device) >= words
        seen = torch.cat([mask, mask.new_ones(hidden_states.shape[:2])], 1)
        _, height, width = img_shapes[0][0]
        turns = rotations(mask, height, width, self.pos_embed.axes_dim, self.pos_embed.theta)
        times = torch.cat([timestep, timestep.new_zeros(1)]).to(x.dtype)  # the last is that of text
        embedded = self.time_text_embed(times, x)
        inputs = self.modulation(embedded), turns, None, drawn, None, None, None, [(0, words, True)], seen
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, *inputs)
            else:
                x = block(x, *inputs)
        return (self.proj_out(self.norm_out(x[:, words:], embedded[:-1])),)


def rotations(mask: Tensor, height: int, width: int, axes: Sequence[int], theta: float) -> Rotations:
    """Return the rotations of text, then of an image.

    They are `exp(i place / theta^(2 k / D))`, k < D / 2. `mask` [B, L] says which words are none.
    `axes` are the sizes D of time, height and width. Word i is at i on all of them. The image of `height` x `width`
    tokens is at the number of words that `mask` keeps, and around 0 along its height and width.
    """
    words = torch.arange(mask.shape[1], device=mask.device)
    rows, columns = (torch.arange(n, device=mask.device) - n // 2 for n in (height, width))
    image = torch.stack([torch.zeros_like(rows[:, None] + columns), *torch.meshgrid(rows, columns, indexing="ij")])
    places = torch.cat([words.expand(3, -1), image.flatten(1)], 1).repeat(len(mask), 1, 1)  # [B, 3, S]
    places[:, 0, len(words) :] += mask.sum(1, keepdim=True)
    turns = list[Tensor]()
    for place, size in zip(places.unbind(1), axes, strict=True):
        rates = 1 / theta ** (torch.arange(0, size, 2, device=mask.device).float() / size)
        angle = place[..., None] * rates
        turns.append(torch.polar(torch.ones_like(angle), angle))
    return Rotations(torch.cat(turns, -1))


class Qwen3VLProcessor(transformers.Qwen3VLProcessor):
    """The part of a `Qwen3VLProcessor` that reads text.

    It needs no torchvision, which the other parts need. It writes the files of the whole again.
    """

    __module__ = transformers.Qwen3VLProcessor.__module__  # as above

    def __init__(self, tokenizer: PreTrainedTokenizerBase, files: Mapping[str, str] = MappingProxyType({})) -> None:
        self.tokenizer, self.files = tokenizer, dict(files)

    def __call__(
        self, text: Sequence[str], padding: bool, padding_side: str, return_tensors: str, images: object = None
    ) -> BatchEncoding:
        if images is not None:
            raise ValueError(
                "image: got one, allowed is text alone in fewstep's pipelines; for images load the pipeline that "
                "`fewstep export STUDENT DIR --format pipeline` writes, with diffusers and torchvision"
            )
        return self.tokenizer(list(text), padding=padding, padding_side=padding_side, return_tensors=return_tensors)

    def apply_chat_template(self, conversation: Any, tokenize: bool, return_dict: bool) -> list[list[int]]:
        return [self.tokenizer.apply_chat_template(conversation, tokenize=tokenize, return_dict=return_dict)]

    @classmethod
    def from_pretrained(cls, place: str, subfolder: str = "") -> Self:
        folder = Path(place) / subfolder
        tokenizer = AutoTokenizer.from_pretrained(place, subfolder=subfolder)
        files = {name: text_in(folder / name) for name in WHOLE if (folder / name).is_file()}
        if tokenizer.chat_template is None and TEMPLATE in files:
            tokenizer.chat_template = json_of(files[TEMPLATE])["chat_template"]
        return cls(tokenizer, files)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        self.tokenizer.save_pretrained(save_directory)
        for name, text in self.files.items():
            write_text(Path(save_directory) / name, text)


@dataclass(frozen=True)
class QwenImage21(FlowTransformer):
    """A `QwenImage21Pipeline` as a backbone.

    States are normalised latents [C, h, w]. The condition is `text [B, L, D]` with `mask [B, L]`.
    """

    @classmethod
    def of(cls, pipe: QwenImage21Pipeline, name: str) -> Self:
        pipe.transformer.__class__ = QwenImage21Transformer2DModel  # weights, hooks and names stay
        return super().of(pipe, name)

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder]

    @property
    def patch(self) -> int:
        return 1

    @property
    def multiple(self) -> int:
        return 2  # its pipeline draws images of even height and width in tokens

    @property
    def largest(self) -> int:
        return MOST_PLACES

    @property
    def time_layer(self) -> str:
        return "time_text_embed.timestep_embedder.linear_2"

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return transformer_features(self.pipe.transformer.transformer_blocks)

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text, (height, width) = cond["text"], x.shape[-2:]
        with single_output(module):
            tokens = module(
                pack(x, self.patch).to(text.dtype),
                text,
                t.to(torch.float32),
                [[(1, height, width)]] * len(x),
                encoder_hidden_states_mask=cond["mask"],
            )[0]
        return unpack(tokens, height, width, self.patch).float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        pipe, most = self.pipe, TEXT + self.pipe._drop_idx
        tokenizer, template = pipe.processor.tokenizer, pipe.prompt_template_t2i
        end = len(tokenizer(template.partition("{}")[2]).input_ids)
        told = tokenizer([template.format(p or BLANK) for p in prompts], verbose=False).input_ids
        words = tokenizer.pad(
            {"input_ids": [cut(ids, most, end) for ids in told]},
            padding="max_length",
            max_length=most,
            padding_side="right",
            return_tensors="pt",
        ).to(pipe.text_encoder.device)
        seen = last_states(pipe.text_encoder, words.input_ids, words.attention_mask)[:, -TEXT:]
        mask = words.attention_mask[:, -TEXT:].bool()
        return on(self.module, {"text": seen * mask[..., None], "mask": mask})


def cut(words: Sequence[int], most: int, end: int) -> list[int]:
    """Leave out words where there are more than `most`.

    The last `end` stay. Its pipeline leaves out none.
    """
    return list(words) if len(words) <= most else [*words[: most - end], *words[len(words) - end :]]


def prompt_tokens(pipe: QwenImage21Pipeline) -> int:
    """Return the number of tokens that a prompt may have.

    Those around it are not counted.
    """
    around = pipe.processor.tokenizer(pipe.prompt_template_t2i.format("")).input_ids
    return TEXT - (len(around) - int(pipe._drop_idx))


def last_states(encoder: nn.Module, words: Tensor, mask: Tensor) -> Tensor:
    """Return what a language model's last block gives, [B, L, D].

    That is before the norm that follows. The network was trained on these. What transformers calls the last states
    differs from version to version.
    """
    seen, handles = list[Tensor](), list[Any]()

    def look(*_: object) -> None:  # now the encoder is loaded
        norm = encoder.get_submodule("model.language_model.norm")
        handles.append(norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))

    handles.append(encoder.register_forward_pre_hook(look))
    try:
        with torch.no_grad():
            encoder(words, attention_mask=mask, logits_to_keep=1, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]


def check(pipe: QwenImage21Pipeline) -> None:
    """Check the settings of a Qwen-Image-2.1 pipeline. Raises UnfitError."""
    require_flow(pipe)
    require_channels(pipe, pipe.vae.config.z_dim, patch=1)
    config, tokenizer = pipe.transformer.config, pipe.processor.tokenizer
    require_rows("processor", tokenizer, pipe.text_encoder)
    if tokenizer.convert_tokens_to_ids(MARK) in (None, tokenizer.unk_token_id) or not tokenizer("words").input_ids:
        raise UnfitError(f"processor has no words, or no {MARK}", "download it again")
    width = pipe.text_encoder.config.text_config.hidden_size
    same("transformer", "context_in_dim", config.context_in_dim, width, f"its text encoder gives {width}")
    same("transformer", "patch_size", config.patch_size, 1, "its pipeline packs no patches")
    same("transformer", "causal_condition", config.causal_condition, True, "text takes part at time 0 in fewstep")
    same("vae", "in_channels", pipe.vae.config.in_channels, 4, "images have an alpha channel")
    same(
        "pipeline", "sample_sigmas", pipe.config.sample_sigmas, None,
        "it is a few-step model already", "pass the base model, Qwen-Image-2.1",
    )  # fmt: skip


FAMILY = Family(
    QwenImage21Pipeline,
    QwenImage21.of,
    told_by="sigmas",
    guidance=lambda scale, count: {"true_cfg_scale": scale, "negative_prompt": [BLANK] * count if scale > 1 else None},
    latents=lambda states: pack(states, 1),
    patch=1,
    alone=True,
    needs="torchvision",
    kinds={"processor": Qwen3VLProcessor},
    check=check,
    original_names=LAYOUT.names,
    comfyui_parts=lambda pipe: ComfyParts(
        "EmptyLatentImage",
        "qwen3vl_8b_int8_convrot.safetensors",
        "qwen_image",
        "qwen_image_2.1_vae_bf16.safetensors",
        shift="",
    ),
)
