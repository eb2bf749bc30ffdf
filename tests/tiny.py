"""The smallest models that show what a test asks for: random weights, built in milliseconds."""

from collections.abc import Sequence

import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline
from torch import Tensor, nn

from fewstep.backbones import miniature
from fewstep.backbones.base import Cond, Denoiser
from fewstep.backbones.parts import PREDICTIONS
from fewstep.backbones.sd import StableDiffusion
from fewstep.backbones.unconditional import PixelModel, pixel_unet
from fewstep.core.schedule import VP, Flow, Schedule

WORDS = ["red cat", "blue dog", "a photo of a green house"]
TABLE = VP((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))


class Net(nn.Module):
    """A convolutional denoiser of [B, 2, 4, 4] with one attention-like layer.

    If it wants one, it has a condition `label [B, 3]`.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inp = nn.Conv2d(2, width, 3, padding=1)
        self.time = nn.Linear(2, width)
        self.label = nn.Linear(3, width)
        self.to_q = nn.Linear(width, width)
        self.out = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        at = self.time(torch.stack([t / 1000, torch.cos(t)], 1).to(x))
        if label is not None:
            at = at + self.label(label)
        h = torch.tanh(self.inp(x) + at[:, :, None, None])
        return self.out(torch.tanh(self.to_q(h.movedim(1, -1)).movedim(-1, 1)))


class Labels:
    """Three numbers from a prompt's letters; zeros for the empty one. Counts the prompts it has encoded."""

    def __init__(self) -> None:
        self.encoded = 0

    def __call__(self, prompts: Sequence[str]) -> Cond:
        self.encoded += len(prompts)
        return {
            "label": torch.tensor([[len(p) / 8, p.count("e"), p.count("a")] if p else [0.0, 0, 0] for p in prompts])
        }


def denoiser(seed: int = 0, schedule: Schedule = TABLE, prediction: str = "v", conditional: bool = True) -> Denoiser:
    """A `Net` as a backbone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net()
    return Denoiser(net, schedule, (2, 4, 4), prediction, Labels() if conditional else None, time_layer="time")


def flow_denoiser(seed: int = 0) -> Denoiser:
    return denoiser(seed, Flow(), "flow")


def pipeline(seed: int = 0, channels: Sequence[int] = (16, 32)) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` of 16x16 images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = miniature.word_tokenizer(WORDS, 600, 8)
        vae, text = miniature.autoencoder([8, 16], 4, 16), miniature.text_encoder(tokenizer, 32, 1, 4)
        return miniature.pipeline(vae, text, tokenizer, miniature.unet(channels, [False, True], 4, 8, 32))


def stable_diffusion(seed: int = 0, channels: Sequence[int] = (16, 32)) -> StableDiffusion:
    """The same as a backbone, as `load_sd` makes one."""
    pipe = pipeline(seed, channels)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    assert pipe.scheduler.config.prediction_type in PREDICTIONS
    return StableDiffusion(pipe, "tiny", VP(pipe.scheduler.alphas_cumprod.double()))


def pixels(labels: Sequence[str] = ("cat", "dog"), seed: int = 0) -> PixelModel:
    """A pixel model of 8x8 images in colour, of these classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = pixel_unet([8, 16], [False, True], 3, 8, len(labels)).requires_grad_(False).eval()
    pipe = DDPMPipeline(net, miniature.scheduler())
    return PixelModel(pipe, "pixels", VP(pipe.scheduler.alphas_cumprod.double()), tuple(labels))
