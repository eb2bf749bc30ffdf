"""Training of the bundled text-to-image teacher.

The stages are the codec, its decoder alone, then text encoder and U-Net on cached latents.
"""

import copy
import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from torch import Tensor, nn

from ..atomic import write_json, write_tensors
from ..backbones import miniature
from ..core.schedule import expand
from ..reading import reading
from ..training.fit import FitConfig, FitStep, fit
from ..training.state import seeded
from . import emoji_data


class Strict(BaseModel):
    """A model whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Strict):
    """The emoji package and how its images are placed."""

    package: str
    version: str
    sha256: str
    folder: str = "data"
    hold_out: float = 0.05
    variants: int = 16  # images of each emoji, at random places and sizes
    least: float = 0.7  # smallest size


class CodecConfig(Strict):
    """Settings of the autoencoder and its training."""

    channels: list[int]
    latent: int
    kl: float
    fit: FitConfig
    decoder: FitConfig  # of the decoder alone, afterwards


class TextConfig(Strict):
    """Sizes of the text encoder and its vocabulary."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    length: int


class DenoiserConfig(Strict):
    """Settings of the U-Net and its training."""

    channels: list[int]
    attention: list[bool]
    drop_caption: float
    fit: FitConfig


class TeacherConfig(Strict):
    """Settings of `recipes/emoji-teacher.yaml`."""

    kind: Literal["teacher"]
    seed: int
    data: DataConfig
    codec: CodecConfig
    text: TextConfig
    denoiser: DenoiserConfig


@dataclass(frozen=True)
class Data:
    """Emoji with their images."""

    emoji: list[emoji_data.Emoji]
    images: Tensor  # [N, 3, 64, 64] in [-1, 1]


def load_data(config: DataConfig) -> Data:
    """Fetch and load the emoji package."""
    archive = emoji_data.fetch(config.package, config.version, config.sha256, Path(config.folder))
    emoji, images = emoji_data.load(archive, config.hold_out)
    return Data(emoji, images.float() / 127.5 - 1)


def train_codec(config: TeacherConfig, data: Data, run: Path) -> Generator[FitStep, None, None]:
    """Train the autoencoder and write it to `run/vae`.

    The loss is `unlikeness` and a small KL, with horizontal flips.
    """
    torch.manual_seed(config.seed)
    vae = miniature.autoencoder(config.codec.channels, config.codec.latent, data.images.shape[-1])
    average = copy.deepcopy(vae)
    train = torch.tensor([i for i, e in enumerate(data.emoji) if not e.held_out])

    def loss_at(step: int) -> Tensor:
        rng = seeded(config.seed, step, "codec")
        x = data.images[train[torch.randint(len(train), (config.codec.fit.batch,), generator=rng)]]
        flip = torch.rand(len(x), generator=rng) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.codec.fit.bf16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
            y = vae.decode(z).sample.float()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return unlikeness(y, x) + config.codec.kl * kl

    yield from fit(vae, average, loss_at, config.codec.fit, run / "codec")
    with torch.no_grad():
        z = torch.cat([average.encode(x).latent_dist.mean for x in data.images.split(64)])
    average.register_to_config(scaling_factor=float(1 / z.std()))
    average.eval().save_pretrained(run / "vae")


def unlikeness(y: Tensor, x: Tensor) -> Tensor:
    """Return the distance of images y and x [B, 3, H, W].

    L1 of pixels and of their differences, and squares of coarse colours. L1 alone gives up rare colours
    (greens came out brown); the mean square over 8x8 blocks keeps them.
    """
    edges = F.l1_loss(y.diff(dim=2), x.diff(dim=2)) + F.l1_loss(y.diff(dim=3), x.diff(dim=3))
    return F.l1_loss(y, x) + edges + 4 * F.mse_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8))


def train_decoder(config: TeacherConfig, data: Data, run: Path) -> Generator[FitStep, None, None]:
    """Train the decoder of `run/vae` further on placed images.

    Placed images show smaller things than the codec was trained on. The encoder stays, and so does every
    cached latent. Writes `run/vae`.
    """
    vae = miniature.load_autoencoder(run / "vae")
    decoder = miniature.Decoder(vae).train()
    average = copy.deepcopy(decoder)
    pixels, mirrors = _pixels(data), torch.tensor([e.mirrors for e in data.emoji])
    train = torch.tensor([i for i, e in enumerate(data.emoji) if not e.held_out])

    def loss_at(step: int) -> Tensor:
        rng = seeded(config.seed, step, "decoder")
        rows = train[torch.randint(len(train), (config.codec.decoder.batch,), generator=rng)]
        x = emoji_data.placed(pixels[rows], mirrors[rows], config.data.least, rng).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=config.codec.decoder.bf16):
            with torch.no_grad():
                posterior = vae.encode(x).latent_dist
            y = decoder(posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)).float()
        return unlikeness(y, x)

    yield from fit(decoder, average, loss_at, config.codec.decoder, run / "decoder")
    decoder.load_state_dict(average.state_dict())
    vae.eval().save_pretrained(run / "vae")


class TextToNoise(nn.Module):
    """Text encoder and U-Net or transformer as one module.

    One loss trains both.
    """

    def __init__(self, text: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.text, self.unet = text, unet

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(x, timestep=t, encoder_hidden_states=self.text(tokens)[0], return_dict=False)[0]


def train_denoiser(config: TeacherConfig, data: Data, run: Path) -> Generator[FitStep, None, None]:
    """Train text encoder and U-Net on cached latents.

    The target is `v` at uniform times. Names are sampled evenly, then a skin tone.
    """
    vae = miniature.load_autoencoder(run / "vae").eval()
    if not (run / "tokenizer").exists():
        words = [e.caption for e in data.emoji]
        miniature.word_tokenizer(words, config.text.vocabulary, config.text.length).save_pretrained(run / "tokenizer")
    tokenizer = miniature.load_tokenizer(run / "tokenizer")
    torch.manual_seed(config.seed)
    text = miniature.text_encoder(tokenizer, config.text.width, config.text.layers, config.text.heads)
    latents = encode_variants(
        config, data, lambda x: vae.encode(x).latent_dist.mean.float() * vae.config.scaling_factor, run
    )
    size = latents.shape[-1]
    net = miniature.unet(
        config.denoiser.channels, config.denoiser.attention, config.codec.latent, size, config.text.width
    )
    model = TextToNoise(text, net)
    average = copy.deepcopy(model)
    tokens = tokenizer(
        [e.caption for e in data.emoji], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    alpha_bar, drop = miniature.scheduler().alphas_cumprod, config.denoiser.drop_caption
    loss_at = v_loss(model, data.emoji, latents, tokens, empty, alpha_bar, config.denoiser.fit, drop, config.seed)
    yield from fit(model, average, loss_at, config.denoiser.fit, run / "denoiser")
    save_teacher(run, vae, average, tokenizer)
    prompts = [e.caption for e in data.emoji if not e.held_out]
    (run / "teacher" / "prompts.txt").write_text("\n".join(dict.fromkeys(prompts)) + "\n", encoding="utf-8")


def v_loss(
    model: nn.Module,
    emoji: list[emoji_data.Emoji],
    latents: Tensor,
    tokens: Tensor,
    empty: Tensor,
    alpha_bar: Tensor,
    fit: FitConfig,
    drop: float,
    seed: int,
) -> Callable[[int], Tensor]:
    """Return the v-prediction loss of a training step.

    `step -> |v(x_t, t, caption) - (alpha eps - sigma x0)|^2` on latents [N, V, ...] with `tokens` [N, L], at
    uniform times. Names are sampled evenly, then a skin tone, then one of V places. The `empty` caption
    replaces captions at the rate `drop`.
    """
    by_name, alpha, sigma = _by_name(emoji), alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    batch = fit.batch

    def loss_at(step: int) -> Tensor:
        rng = seeded(seed, step, "denoiser")
        names = torch.randint(len(by_name), (batch,), generator=rng).tolist()
        plain, pick = torch.rand(batch, generator=rng).tolist(), torch.rand(batch, generator=rng).tolist()
        rows = torch.tensor([_variant(by_name[n], p, q) for n, p, q in zip(names, plain, pick, strict=True)])
        x0 = latents[rows, torch.randint(latents.shape[1], (batch,), generator=rng)].float()
        # Stratified times, one per slice of [0, T): this halves the noise of the loss at no cost. The last may be
        # rounded up to T.
        t = (
            ((torch.arange(batch) + torch.rand(batch, generator=rng)) / batch * len(alpha))
            .long()
            .clamp(max=len(alpha) - 1)
        )
        eps = torch.randn(x0.shape, generator=rng)
        a, s = expand(alpha[t], x0), expand(sigma[t], x0)
        captions = torch.where((torch.rand(batch, generator=rng) < drop)[:, None], empty, tokens[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=fit.bf16):
            v = model(a * x0 + s * eps, t, captions)
        return F.mse_loss(v.float(), a * eps - s * x0)

    return loss_at


def encode_variants(config: TeacherConfig, data: Data, encode: Callable[[Tensor], Tensor], run: Path) -> Tensor:
    """Encode every emoji at `variants` places as scaled latents.

    Half precision [N, V, C, h, w]. Computed once and kept in the run.
    """
    file = run / "latents.safetensors"
    if not file.exists():
        pixels, mirrors = _pixels(data), torch.tensor([e.mirrors for e in data.emoji])
        parts = []
        for v in range(config.data.variants):
            x = (
                emoji_data.placed(pixels, mirrors, config.data.least, seeded(config.seed, v, "places")).float() / 127.5
                - 1
            )
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=config.denoiser.fit.bf16):
                parts.append(torch.cat([encode(p) for p in x.split(64)]))
        write_tensors(file, {"latents": torch.stack(parts, 1).half()})
    with reading(file, "delete it and run the same command again"):
        return load_file(file)["latents"]


def save_teacher(run: Path, vae: nn.Module, average: TextToNoise, tokenizer: object) -> Path:
    """Write the averaged weights as a pipeline folder, `run/teacher`.

    A `StableDiffusionPipeline` in half precision.
    """
    pipe = miniature.pipeline(vae, average.text, tokenizer, average.unet).to(dtype=torch.float16)
    pipe.save_pretrained(run / "teacher")
    # Half-precision files are read in single precision. Without this, transformers would load the text encoder in
    # half precision, unlike the U-Net.
    config = run / "teacher" / "text_encoder" / "config.json"
    write_json(config, {**json.loads(config.read_text(encoding="utf-8")), "dtype": "float32"})
    return run / "teacher"


def train_teacher(config: TeacherConfig, run: Path) -> Generator[tuple[str, FitStep], None, None]:
    """Train all stages in order and write `run/teacher`.

    Each stage resumes where it stopped. The result is an ordinary pipeline folder.
    """
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "run.json", config.model_dump())
    data = load_data(config.data)
    if not (run / "vae" / "config.json").exists():
        yield from (("codec", s) for s in train_codec(config, data, run))
    yield from (("decoder", s) for s in train_decoder(config, data, run))
    yield from (("denoiser", s) for s in train_denoiser(config, data, run))


def _pixels(data: Data) -> Tensor:
    """Return the images as uint8 [N, 3, 64, 64]."""
    return ((data.images + 1) * 127.5).round().to(torch.uint8)


def _by_name(emoji: list[emoji_data.Emoji]) -> list[list[int]]:
    """List row numbers per name, the plain image first.

    Held-out variants are left out.
    """
    rows: dict[str, list[int]] = {}
    for i, e in enumerate(emoji):
        if not e.held_out:
            rows.setdefault(e.name, []).append(i)
    return list(rows.values())


def _variant(rows: list[int], plain: float, pick: float) -> int:
    """Choose the plain image or, half of the time, a skin tone."""
    return rows[0] if len(rows) == 1 or plain < 0.5 else rows[1 + int(pick * (len(rows) - 1))]
