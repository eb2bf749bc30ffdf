"""A data set of blobs in place of the emoji, its reference, and generators that draw from it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.evaluation.plan import EmojiProtocol
from fewstep.evaluation.reference import build_reference, load_reference

TONES = {"light skin tone": (243, 211, 177), "medium skin tone": (178, 134, 101), "dark skin tone": (106, 78, 70)}
PLAIN = (251, 192, 40)
Draw = Callable[[Sequence[str], Sequence[int]], Tensor]


@dataclass(frozen=True)
class Blob:
    name: str
    caption: str
    tone: str
    held_out: bool


def blob(name: int, tone: str) -> Tensor:
    """Stripes of two colours, of some width and direction, behind a square of skin, uint8 [3, 64, 64]."""
    generator = torch.Generator().manual_seed(name)
    angle, width = torch.rand(2, generator=generator).tolist()
    light, dark = torch.rand((2, 3, 1, 1), generator=generator)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    wave = torch.sin((x * math.cos(3 * angle) + y * math.sin(3 * angle)) / (2 + 8 * width)) > 0
    image = torch.where(wave, light, dark)
    image[:, 20:44, 8:40] = torch.tensor(TONES.get(tone, PLAIN))[:, None, None] / 255
    return (image * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class World:
    """30 names, 8 of them in three skin tones, the last tone of the first four held out."""

    folder: Path
    blobs: tuple[Blob, ...]
    images: Tensor
    protocol: EmojiProtocol

    def draw(self, noise: float = 0.0, names: Callable[[str], str] = str, one_seed: bool = False) -> Draw:
        """The prompt's image under a veil of the seed's colours; `names` may send a prompt to another one."""
        rows = {b.caption: i for i, b in enumerate(self.blobs)}

        def sampler(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            images = self.images[[rows[names(p)] for p in prompts]].float() / 255
            veils = [
                torch.rand((3, 3, 3), generator=torch.Generator().manual_seed(0 if one_seed else s)) for s in seeds
            ]
            return images.lerp(F.interpolate(torch.stack(veils), (64, 64), mode="bilinear"), noise)

        return sampler


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    blobs, images = [], []
    for i in range(30):
        for tone in ["", *(TONES if i < 8 else [])]:
            name = f"thing {i}: round, soft"
            blobs.append(Blob(name, f"{name}, {tone}" if tone else name, tone, i < 4 and tone == "dark skin tone"))
            images.append(blob(i, tone))
    folder = build_reference(blobs, torch.stack(images), tmp_path_factory.mktemp("reference"), components=16)
    protocol = EmojiProtocol(
        "blobs",
        names=20,
        repeated=3,
        seeds=3,
        toned=6,
        held_out=4,
        reference=load_reference(folder).sha256,
        components=6,
        batch=8,
    )
    return World(folder, tuple(blobs), torch.stack(images), protocol)
