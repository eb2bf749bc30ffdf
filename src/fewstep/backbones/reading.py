"""How text encoders read prompts.

The number of tokens of a prompt, and the tokens that an encoder takes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diffusers import (
    CogVideoXPipeline,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    QwenImage21Pipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
)
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import PreTrainedTokenizerBase

from .base import Backbone
from .parts import DiffusersBackbone
from .qwenimage21 import prompt_tokens

T5_TOKENS = 256  # token limit of SD3's third encoder
PIXART_TOKENS = 120  # token limit of PixArt-alpha
SIGMA_TOKENS = 300  # token limit of PixArt-Sigma
WAN_TOKENS = 512  # token limit of Wan


@dataclass(frozen=True)
class Reading:
    """One encoder's view of some prompts.

    `most` is the largest number of tokens that the encoder takes, begin and end included. `lengths` has the
    number of tokens of each prompt, `taken` the tokens that the encoder takes.
    """

    encoder: str
    most: int
    lengths: tuple[int, ...]
    taken: tuple[tuple[int, ...], ...]


def readings(backbone: Backbone, prompts: Sequence[str]) -> list[Reading]:
    """Return the readings of every text encoder.

    Empty for a backbone without text encoders and for a custom one.
    """
    if not isinstance(backbone, DiffusersBackbone):
        return []
    pipe, found = backbone.pipe, []
    for name, words, most in _tokenizers(pipe):
        texts = [_converted(pipe, p, words) for p in prompts]
        rows = words(texts, truncation=False, padding=False, add_special_tokens=True).input_ids if texts else []
        taken = tuple(tuple(r) if len(r) <= most else (*r[: most - 1], r[-1]) for r in rows)
        found.append(Reading(name.replace("tokenizer", "text_encoder"), most, tuple(len(r) for r in rows), taken))
    return found


def _tokenizers(pipe: DiffusionPipeline) -> Iterator[tuple[str, PreTrainedTokenizerBase, int]]:
    """Yield a pipeline's tokenizers, with their names and token limits."""
    if isinstance(pipe, QwenImage21Pipeline):
        yield "tokenizer", pipe.processor.tokenizer, prompt_tokens(pipe)
        return
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        words = pipe.components.get(name)
        if not isinstance(words, PreTrainedTokenizerBase):
            continue
        if isinstance(pipe, CogVideoXPipeline):
            yield name, words, pipe.transformer.config.max_text_seq_length
        elif isinstance(pipe, PixArtSigmaPipeline):
            yield name, words, SIGMA_TOKENS
        elif isinstance(pipe, PixArtAlphaPipeline):
            yield name, words, PIXART_TOKENS
        elif isinstance(pipe, WanPipeline):
            yield name, words, WAN_TOKENS
        elif isinstance(pipe, StableDiffusion3Pipeline) and name == "tokenizer_3":
            yield name, words, T5_TOKENS
        else:
            yield name, words, words.model_max_length


def _converted(pipe: DiffusionPipeline, prompt: str, words: PreTrainedTokenizerBase) -> str:
    """Spell out a prompt's words of several tokens, if the pipeline does."""
    return str(pipe.maybe_convert_prompt(prompt, words)) if isinstance(pipe, TextualInversionLoaderMixin) else prompt
