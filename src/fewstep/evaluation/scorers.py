"""Scores of images by published CLIP models.

CLIP score, PickScore, HPSv2.1 and LAION's aesthetic score. Every scorer is a CLIP model of transformers with one
formula on top.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ..reading import reading
from .scorer import Scorer
from .weights import Found, Weights, find_weights

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Fit = Literal["crop", "pad"]


def pil_images(images: Tensor) -> list[Image.Image]:
    """Return images [B, 3, H, W] in 8 bits."""
    values = (images.detach().cpu().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(value, "RGB") for value in values]


def clip_pixels(images: Tensor, size: int, fit: Fit = "crop") -> Tensor:
    """Return the inputs [B, 3, size, size] of a CLIP model.

    Bicubic, antialiased. `crop`, as CLIP's processor: the shorter side becomes `size`, in 8 bits, and the middle is
    taken. `pad`, as HPSv2's: the longer side becomes `size`, without rounding, and black fills the rest.
    """
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return ((_cropped if fit == "crop" else _padded)(images, size) - mean) / std


def _cropped(images: Tensor, size: int) -> Tensor:
    found = []
    for image in pil_images(images):
        scale = size / min(image.size)
        width, height = (int(side * scale) if side != min(image.size) else size for side in image.size)
        small = image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        square = small.crop((left, top, left + size, top + size))
        found.append(torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255)
    return torch.stack(found)


def _padded(images: Tensor, size: int) -> Tensor:
    values = (images.detach().cpu().float().clamp(0, 1) * 255).round() / 255
    height, width = (round(side * size / max(values.shape[2:])) for side in values.shape[2:])
    small = values
    if (height, width) != tuple(values.shape[2:]):
        small = F.interpolate(values, (height, width), mode="bicubic", antialias=True)
    below, right = size - height, size - width
    return F.pad(small, (right // 2, right - right // 2, below // 2, below - below // 2))


def cosine(images: Tensor, texts: Tensor) -> Tensor:
    """Return the cosine [B] of embeddings [B, D]."""
    return (F.normalize(images, dim=1) * F.normalize(texts, dim=1)).sum(1)


def seen_by(model: CLIPModel | CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
    """Return the embeddings [B, D] of inputs [B, 3, S, S]."""
    return model.visual_projection(model.vision_model(pixel_values=pixels.to(model.device)).pooler_output)


def read_by(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Return the embeddings [B, D] of texts.

    They are padded to the longest that the model reads.
    """
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids, mask = (tokens[name].to(model.device) for name in ("input_ids", "attention_mask"))
    return model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)


@dataclass(frozen=True)
class ClipScorer:
    """A score of the cosine between an image and its prompt.

    `formula` maps (cosine [B], logit scale) to scores [B].
    """

    key: str
    model: CLIPModel
    tokenizer: CLIPTokenizer
    formula: Callable[[Tensor, float], Tensor]
    fit: Fit = "crop"
    weights: Mapping[str, str] = field(default_factory=dict)
    clips: bool = False
    of: str = ""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            seen = seen_by(self.model, clip_pixels(images, self.model.config.vision_config.image_size, self.fit))
            read = read_by(self.model, self.tokenizer, prompts)
            return self.formula(cosine(seen, read), float(self.model.logit_scale.exp())).float().cpu()

    def close(self) -> None:
        """Do nothing: memory is all it holds."""


@dataclass(frozen=True)
class AestheticScorer:
    """A score of the image alone, from its normalised CLIP embedding."""

    key: str
    model: CLIPVisionModelWithProjection
    head: nn.Module
    weights: Mapping[str, str] = field(default_factory=dict)
    clips: bool = False
    of: str = ""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            seen = seen_by(self.model, clip_pixels(images, self.model.config.image_size))
            return self.head(F.normalize(seen, dim=1)).squeeze(1).float().cpu()

    def close(self) -> None:
        """Do nothing: memory is all it holds."""


class AestheticHead(nn.Module):
    """The linear layers of LAION's aesthetic predictor, version 2."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        sizes, dropped = (width, 1024, 128, 64, 16, 1), (0.2, 0.2, 0.1)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            layers += [nn.Linear(a, b), *([nn.Dropout(dropped[i])] if i < len(dropped) else [])]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an open_clip model to those of transformers' CLIPModel.

    Query, key and value are one matrix there, and projections are transposed.
    """
    found: dict[str, Tensor] = {}
    towers = (("visual.transformer.resblocks.", "vision_model"), ("transformer.resblocks.", "text_model"))
    plain = {
        "logit_scale": "logit_scale",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    }
    inner = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for name, tensor in state.items():
        if name in plain:
            found[plain[name]] = tensor
        elif name in ("visual.proj", "text_projection"):
            found["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = tensor.T
        for start, tower in towers:
            if not name.startswith(start):
                continue
            layer, _, rest = name.removeprefix(start).partition(".")
            place, (module, _, kind) = f"{tower}.encoder.layers.{layer}.", rest.rpartition(".")
            if rest.startswith("attn.in_proj_"):
                for part, piece in zip(("q", "k", "v"), tensor.chunk(3), strict=True):
                    found[f"{place}self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}"] = piece
            else:
                found[f"{place}{inner[module]}.{kind}"] = tensor
            break
    return {name: tensor.contiguous() for name, tensor in found.items()}


# Published scorers.

TOKENS = ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
CLIP_L = Weights("openai/clip-vit-large-patch14", ("config.json", "model.safetensors", *TOKENS))
CLIP_H_TOKENS = Weights("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", TOKENS)
PICK = Weights("yuvalkirstain/PickScore_v1", ("config.json", "model.safetensors"))
HPS = Weights("RE-N-Y/hpsv21", ("model.safetensors",))
LAION = Weights("RE-N-Y/laion-aesthetic", ("model.safetensors",))


def vit_h() -> CLIPConfig:
    """Return the configuration of open_clip's ViT-H-14."""
    text = CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        projection_dim=1024,
        hidden_act="gelu",
    )
    vision = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=1024,
        hidden_act="gelu",
    )
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=1024)


def vit_l_vision() -> CLIPVisionConfig:
    """Return the configuration of the image half of CLIP ViT-L/14."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )


def device() -> torch.device:
    """Return the device of published scorers.

    A transformer of half a billion weights is too slow on a CPU.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _clip_score(cos: Tensor, scale: float) -> Tensor:
    return 100 * cos.clamp(min=0)


def _logit(cos: Tensor, scale: float) -> Tensor:
    return scale * cos


def _percent(cos: Tensor, scale: float) -> Tensor:
    return 100 * cos


def clip_score(key: str = "clip_score") -> Scorer:
    """Load CLIP ViT-L/14.

    The score is 100 times the cosine, or 0 where it is negative.
    """
    found = find_weights(CLIP_L, f"--metrics {key}")
    return ClipScorer(key, clip_of(found), tokenizer_of(found), _clip_score, weights=found.record())


def pickscore(key: str = "pickscore") -> Scorer:
    """Load PickScore v1: the cosine times its logit scale."""
    found, tokens = find_weights(PICK, f"--metrics {key}"), find_weights(CLIP_H_TOKENS, f"--metrics {key}")
    return ClipScorer(key, clip_of(found), tokenizer_of(tokens), _logit, weights=found.record() | tokens.record())


def hpsv21(key: str = "hpsv21") -> Scorer:
    """Load HPSv2.1.

    The score is 100 times the cosine, of images whose longer side is scaled to 224.
    """
    found, tokens = find_weights(HPS, f"--metrics {key}"), find_weights(CLIP_H_TOKENS, f"--metrics {key}")
    model = CLIPModel(vit_h())
    _fill(model, from_open_clip(_state(found.folder / "model.safetensors", "model.")), found)
    weights = found.record() | tokens.record()
    return ClipScorer(key, model.eval().to(device()), tokenizer_of(tokens), _percent, "pad", weights)


def aesthetic(key: str = "aesthetic") -> Scorer:
    """Load LAION's aesthetic predictor, version 2, on CLIP ViT-L/14."""
    found = find_weights(LAION, f"--metrics {key}")
    model, head = CLIPVisionModelWithProjection(vit_l_vision()), AestheticHead()
    file = found.folder / "model.safetensors"
    _fill(model, _state(file, "clip."), found)
    _fill(head, _state(file, "mlp."), found)
    return AestheticScorer(key, model.eval().to(device()), head.eval().to(device()), found.record())


SCORERS: dict[str, Callable[[], Scorer]] = {
    "clip_score": clip_score,
    "pickscore": pickscore,
    "hpsv21": hpsv21,
    "aesthetic": aesthetic,
}


def clip_of(found: Found) -> CLIPModel:
    """Read a CLIP model."""
    with reading(f"weights {found.folder}:", "fetch them again", "cannot be used"):
        return CLIPModel.from_pretrained(found.folder, local_files_only=True).eval().to(device())


def tokenizer_of(found: Found) -> CLIPTokenizer:
    """Read a tokenizer."""
    with reading(f"tokenizer {found.folder}:", "fetch it again", "cannot be used"):
        return CLIPTokenizer.from_pretrained(found.folder, local_files_only=True)


def _state(file: Path, prefix: str) -> dict[str, Tensor]:
    """Read the tensors whose names begin with `prefix`, without it."""
    with reading(f"weights {file}:", "fetch them again"):
        return {k.removeprefix(prefix): v.float() for k, v in load_file(file).items() if k.startswith(prefix)}


def _fill(module: nn.Module, state: Mapping[str, Tensor], found: Found) -> None:
    known = module.state_dict()
    lacking = sorted(known.keys() - state.keys() - {k for k in known if k.endswith("position_ids")})
    if lacking:
        raise ValueError(f"weights {found.folder}: they lack {lacking[0]}; fetch {found.weights.repo} again")
    with reading(f"weights {found.folder}:", "fetch them again", "cannot be used"):
        module.load_state_dict({k: state[k] for k in known if k in state}, strict=False)
