"""A Stable Diffusion pipeline in miniature.

The same classes, a few million parameters, a vocabulary of its own. The networks are built from plain
numbers, so `StableDiffusionPipeline.from_pretrained` loads the bundled teacher as any other, and tests make
one with random weights in milliseconds.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .weights import load_network

START, END = "<|startoftext|>", "<|endoftext|>"


def word_tokenizer(corpus: Sequence[str], vocabulary: int, length: int) -> CLIPTokenizer:
    """Return a CLIP byte-pair tokenizer with merges learned on `corpus`.

    Any other text falls back to bytes. The library's own trainer breaks ties differently in every process, so
    `learn_merges` learns the merges.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(corpus, vocabulary - len(alphabet))
    pieces = alphabet + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length, pad_token=END)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load a tokenizer that `save_pretrained` wrote."""
    return CLIPTokenizer.from_pretrained(folder)


def learn_merges(corpus: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Return the `count` byte pairs that are most frequent in turn.

    Sennrich et al. 2016, arXiv 1508.07909. The alphabet decides ties. A small corpus gives fewer pairs.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found = Counter(word for text in corpus for word, _ in split.pre_tokenize_str(text.lower()))
    words = {(*word[:-1], word[-1] + "</w>"): n for word, n in found.items()}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merged(word, best): n for word, n in words.items()}
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Merge every occurrence of `pair` in `word`."""
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)


def text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextModel:
    """Return a causal CLIP text transformer with random weights.

    Vocabulary and length are the tokenizer's.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=width, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def autoencoder(channels: Sequence[int], latent: int, size: int, groups: int = 8) -> AutoencoderKL:
    """Return a convolutional KL autoencoder with random weights.

    The encoder halves the resolution len(channels) - 1 times.
    """
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=latent, block_out_channels=tuple(channels),
        layers_per_block=1, norm_num_groups=groups, sample_size=size,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels), mid_block_add_attention=False,
    )  # fmt: skip


class Decoder(nn.Module):
    """The decoding half of an autoencoder."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.first, self.rest = vae.post_quant_conv, vae.decoder

    def forward(self, z: Tensor) -> Tensor:
        drawn: Tensor = self.rest(self.first(z))
        return drawn


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """Load an autoencoder that `save_pretrained` wrote, in eval mode."""
    network: AutoencoderKL = load_network(AutoencoderKL, folder)
    return network


def unet(
    channels: Sequence[int], attention: Sequence[bool], latent: int, size: int, text_width: int, groups: int = 16
) -> UNet2DConditionModel:
    """Return a conditional U-Net with random weights.

    A level has cross attention where `attention` is true. The pooled text is added to the time embedding.
    """
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    return UNet2DConditionModel(
        sample_size=size, in_channels=latent, out_channels=latent, block_out_channels=tuple(channels),
        layers_per_block=1, down_block_types=down, up_block_types=up, cross_attention_dim=text_width,
        attention_head_dim=4, norm_num_groups=groups, addition_embed_type="text",
        addition_embed_type_num_heads=8, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Return a cosine schedule with zero terminal SNR and v-prediction.

    The times are trailing.
    """
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, prediction_type="v_prediction",
        timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, steps_offset=1,
    )  # fmt: skip


def pipeline(
    vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, net: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Return the four parts as a `StableDiffusionPipeline` in eval mode."""
    return StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text.eval(), tokenizer=tokenizer, unet=net.eval(), scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
