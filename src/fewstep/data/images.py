"""Real images as clean states.

Used for fine-tuning a teacher and for the adversarial term.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..atomic import SHA256, read_hashed, write_rows
from ..backbones.base import Backbone, rows
from ..methods.method import RealBatch
from ..transfer import all_sent, sent
from .captioned import OPTION, Captioned, read_images
from .image_files import in_colour, opened, squared
from .prompts import Embeddings, Kept, embed, ignore
from .texts import Found

DECODED = 2  # version of the decoding of files to pixels; another version is another cache


def to_tensor(captioned: Captioned, size: int) -> Tensor:
    """Return an image as a tensor [3, size, size] in [0, 1].

    The image is upright and on white; the shorter side is scaled to `size`, and the centre is cropped. Raises
    ValueError that names the image.
    """
    with opened(captioned.read(), captioned.name, OPTION) as image:
        return squared(in_colour(image), size)


class ImageData:
    """Clean states of images with conditions, encoded once, on the CPU."""

    def __init__(self, x0: Tensor, embeddings: Embeddings, key: str) -> None:
        self.x0, self.embeddings = x0, embeddings
        self.key = key  # a hash of the encoders' identity, the images and the captions

    def __len__(self) -> int:
        return len(self.x0)

    def draw(self, batch: int, rng: torch.Generator, device: torch.device) -> RealBatch:
        """Draw a random batch, each image with the image's own caption."""
        drawn = torch.randint(len(self), (batch,), generator=rng)
        return RealBatch(sent(self.x0[drawn], device), all_sent(rows(self.embeddings.cond, drawn), device))


def encode_images_of(
    backbone: Backbone,
    source: str,
    cache: Path | None,
    identity: str,
    chunk: int = 32,
    found: Callable[[Found], None] = ignore,
    keep: Kept = ignore,
) -> ImageData:
    """Encode the real images of `source`, once.

    `cache` is a folder, and `identity` names the encoders. One chunk of images is in memory at a time.
    `found` is called with what the source holds before the encoding, and `keep` with each file that is going
    to be written.

    Raises ValueError for a backbone without images, and for images without any caption if the backbone is
    conditioned on captions.
    """
    if not (size := backbone.image_size):
        raise ValueError(f"{OPTION}: the states of {backbone.name} are no images; leave it out")
    captioned, seen = read_images(source)
    found(seen)
    if backbone.encode([""]) and not any(p.caption for p in captioned):
        raise ValueError(
            f"{OPTION}: none of the {seen.line} has a caption; "
            "write metadata.jsonl with file_name and text, or a .txt beside each image"
        )
    digest = hashlib.sha256(json.dumps([identity, size, DECODED]).encode())
    for p in captioned:
        digest.update(json.dumps([p.name, p.caption]).encode() + hashlib.sha256(p.read()).digest())
    key = digest.hexdigest()[:24]
    embeddings = embed(backbone, [p.caption for p in captioned], cache, identity, keep=keep)

    def encode() -> Iterator[Tensor]:
        for i in range(0, len(captioned), chunk):
            yield backbone.encode_images(torch.stack([to_tensor(p, size) for p in captioned[i : i + chunk]])).cpu()

    path = None if cache is None else cache / f"images-{key}.safetensors"
    return ImageData(made_once(path, len(captioned), backbone.shape, encode, keep), embeddings, key)


def made_once(
    path: Path | None, count: int, shape: tuple[int, ...], make: Callable[[], Iterator[Tensor]], keep: Kept = ignore
) -> Tensor:
    """Return the states kept in `path`, or make and keep them.

    States are [count, *shape]; new states are made in parts. A file that is damaged or holds other states is
    made again.
    """
    if path is not None and path.exists():
        try:
            tensors, about = read_hashed(path)
            x0 = tensors["x0"]
            if SHA256 in about and x0.shape == (count, *shape) and x0.is_floating_point():
                return x0
        except (SafetensorError, KeyError):
            pass
        path.unlink()
    if path is None:
        return torch.cat(list(make()))
    write_rows(path, count, ({"x0": part} for part in make()), {}, keep)
    return read_hashed(path)[0]["x0"]
