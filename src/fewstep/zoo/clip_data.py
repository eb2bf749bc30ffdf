"""Animated emoji with names: captions and short clips.

The clips are those of the npm package `@lobehub/fluent-emoji-anim-1`. The names are those of
`emoji-datasource-google`, which names its files by the same code points. Fluent emoji are Microsoft's, the
package is MIT.
"""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ImageSequence
from safetensors.torch import load_file
from torch import Tensor

from ..atomic import write_tensors
from ..data.image_files import opened
from ..reading import reading
from .emoji_data import Emoji, catalogue, on_white, placed

STRIDE = 3  # 8 of the clips' 24 frames per second, CogVideoX's own rate


@dataclass(frozen=True)
class Clips:
    """Emoji that move, with all their frames.

    The frames of an emoji are uint8 [n, 3, S, S] on white. Each emoji has its own n.
    """

    emoji: list[Emoji]
    frames: list[Tensor]

    @property
    def mirrors(self) -> Tensor:
        """Which emoji may be mirrored, [N]."""
        return torch.tensor([e.mirrors for e in self.emoji])


def load_clips(names: Path, archive: Path, size: int, cache: Path) -> Clips:
    """Load the named clips of `archive` that move.

    In the order of the catalogue in `names`. The clips are decoded once into `cache`.
    """
    with tarfile.open(names) as tar:
        entries = next(
            file.read() for m in tar if m.name == "package/emoji.json" and (file := tar.extractfile(m)) is not None
        )
    emoji = {e.file.removesuffix(".png"): e for e in catalogue(json.loads(entries), 0.0)}
    if not cache.exists():
        with tarfile.open(archive) as tar:
            files = {
                Path(m.name).stem: file.read()
                for m in tar
                if m.name.endswith(".webp") and (file := tar.extractfile(m)) is not None
            }
        decoded = {key: read_frames(files[key], size) for key in emoji if key in files}
        write_tensors(cache, {key: frames for key, frames in decoded.items() if len(frames) > 1})
    with reading(cache, "delete it and run the same command again"):
        found = load_file(cache)
    return Clips([e for key, e in emoji.items() if key in found], [found[key] for key in emoji if key in found])


def read_frames(webp: bytes, size: int) -> Tensor:
    """Return all frames of an image file on white.

    uint8 [n, 3, S, S].
    """
    with opened(webp, "a clip of the package", "data.package") as image:
        frames = np.stack([on_white(frame, size) for frame in ImageSequence.Iterator(image)])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


def draw_clips(clips: Clips, rows: list[int], count: int, least: float, rng: torch.Generator) -> Tensor:
    """Sample `count` frames of each of these clips.

    Returns uint8 [B, F, 3, S, S]. Every `STRIDE`th frame is taken, from a random one on. Each clip gets a
    random place, size and side, the same for all its frames, so that nothing moves that did not. As with
    images, a name then has many clips.
    """
    parts = []
    for row, start in zip(rows, torch.rand(len(rows), generator=rng).tolist(), strict=True):
        frames = clips.frames[row]
        first = int(start * max(1, len(frames) - STRIDE * (count - 1)))
        parts.append(frames[(first + STRIDE * torch.arange(count)).clamp(max=len(frames) - 1)])
    whole = torch.stack(parts)
    return placed(whole.flatten(1, 2), clips.mirrors[rows], least, rng).reshape(whole.shape)
