"""Noto emoji with names: captions and 64x64 images.

The npm package `emoji-datasource-google` is fetched by name with `npm pack` and checked against a SHA-256.
The images are Apache-2.0 (Google), `emoji.json` is MIT. Only training the shipped teacher again needs the
package.
"""

import hashlib
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.image_files import opened
from ..training.state import seeded

TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


SIDED = {"left", "right", "left-facing", "right-facing", "leftwards", "rightwards", "letters", "abcd", "input"}


@dataclass(frozen=True)
class Emoji:
    """One image with its names.

    All skin tones of an emoji share `name`. `caption` is the prompt. A `held_out` image is never trained on.
    """

    name: str
    caption: str
    tone: str
    file: str
    held_out: bool
    mirrors: bool = True  # whether the mirror image is as right


def fetch(package: str, version: str, sha256: str, folder: Path) -> Path:
    """Return a package's archive in `folder`, downloaded if missing.

    Raises ValueError for a wrong checksum, and where npm is missing.
    """
    archive = folder / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        if shutil.which("npm") is None:
            raise ValueError(
                f"data.package: {archive} is not there and npm is not installed; "
                f"install npm, or put the archive of {package}@{version} at that path"
            )
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "pack", "--silent", f"{package}@{version}"],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"data.sha256: {archive} has {found}, expected {sha256}; delete the file and run the same command again"
        )
    return archive


def catalogue(entries: list[dict], hold_out: float) -> list[Emoji]:
    """List all emoji with a Google image.

    A fraction `hold_out` of the single-tone variants, chosen by hash, is held out.
    """
    result = []
    for entry in entries:
        if not entry.get("has_img_google"):
            continue
        name = " ".join(entry["name"].lower().split())
        mirrors = (
            entry["category"] not in ("Symbols", "Flags")
            and entry["subcategory"] != "time"
            and not SIDED & set(name.split())
        )
        result.append(Emoji(name, name, "", entry["image"], False, mirrors))
        for code, variant in entry.get("skin_variations", {}).items():
            if not variant.get("has_img_google"):
                continue
            tones = list(dict.fromkeys(TONES[c] for c in code.split("-")))
            caption = f"{name}, {' and '.join(tones)}"
            chance = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "little") / 2**32
            result.append(
                Emoji(
                    name,
                    caption,
                    tones[0] if len(tones) == 1 else "",
                    variant["image"],
                    len(tones) == 1 and chance < hold_out,
                    mirrors,
                )
            )
    return result


def load(archive: Path, hold_out: float) -> tuple[list[Emoji], Tensor]:
    """Load emoji and their images, in the order of the catalogue.

    Returns (emoji, uint8 [N, 3, 64, 64] on white).
    """
    with tarfile.open(archive) as tar:
        wanted = (m for m in tar if m.name.startswith("package/img/google/64/") or m.name == "package/emoji.json")
        blobs = {m.name: file.read() for m in wanted if (file := tar.extractfile(m)) is not None}
    emoji = catalogue(json.loads(blobs["package/emoji.json"]), hold_out)
    images = [_read(blobs[f"package/img/google/64/{e.file}"]) for e in emoji]
    return emoji, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def load_style(archive: Path, emoji: list[Emoji], style: str) -> tuple[list[Emoji], Tensor]:
    """Load the same emoji as another artist drew them.

    `archive` is another package's. Returns (the emoji that it has, uint8 [N, 3, 64, 64] on white). `style` is
    `twemoji` (`emoji-datasource-twitter`, images CC BY 4.0) or `fluent` (`@lobehub/fluent-emoji-3d`, MIT).
    """
    where = {"twemoji": "package/img/twitter/64/{}.png", "fluent": "package/assets/{}.webp"}[style]
    folder = where.rpartition("/")[0] + "/"
    with tarfile.open(archive) as tar:
        blobs = {
            m.name: file.read() for m in tar if m.name.startswith(folder) and (file := tar.extractfile(m)) is not None
        }
    there = [(e, blobs[name]) for e in emoji if (name := where.format(e.file.removesuffix(".png"))) in blobs]
    images = np.stack([_read(blob) for _, blob in there])
    return [e for e, _ in there], torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _read(png: bytes) -> np.ndarray:
    with opened(png, "an image of the package", "data.package") as image:
        return on_white(image, 64)


def on_white(image: Image.Image, size: int) -> np.ndarray:
    """Return an image as bytes [size, size, 3], transparency on white."""
    image = image.convert("RGBA")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    background = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(background, image).convert("RGB"))


def placed(images: Tensor, mirrors: Tensor, least: float, rng: torch.Generator) -> Tensor:
    """Put every image at a random place, size and side.

    uint8 [N, 3, 64, 64] -> the same, on white. An image is scaled by a factor between `least` and 1, moved
    within the room that this leaves, and mirrored half of the time where `mirrors` [N]. A name then has many
    images. Without this, a teacher learns the only image of a name by heart, and nothing is left to distil.
    """
    n = len(images)
    scale = least + (1 - least) * torch.rand(n, generator=rng)
    shift = (2 * torch.rand((n, 2), generator=rng) - 1) * (1 - scale)[:, None]
    side = torch.where(mirrors & (torch.rand(n, generator=rng) < 0.5), -1.0, 1.0)
    transform = torch.zeros(n, 2, 3)
    transform[:, 0, 0], transform[:, 1, 1] = side / scale, 1 / scale
    transform[:, 0, 2], transform[:, 1, 2] = -shift[:, 0] * side / scale, -shift[:, 1] / scale
    parts = []
    for x, t in zip(images.split(512), transform.split(512), strict=True):
        grid = F.affine_grid(t, list(x.shape), align_corners=False)
        ink = F.grid_sample(255 - x.float(), grid, mode="bicubic", padding_mode="zeros", align_corners=False)
        parts.append((255 - ink).clamp(0, 255).round().to(torch.uint8))
    return torch.cat(parts)


def with_places(emoji: list[Emoji], images: Tensor, copies: int = 3, least: float = 0.7) -> tuple[list[Emoji], Tensor]:
    """Return the data set with `copies` more of every plain emoji.

    Each copy is at a random place. A teacher's images are compared with these.
    """
    plain = [i for i, e in enumerate(emoji) if not e.tone and e.caption == e.name]
    mirrors = torch.tensor([emoji[i].mirrors for i in plain])
    more = [placed(images[plain], mirrors, least, seeded(0, c, "reference")) for c in range(copies)]
    return emoji + [emoji[i] for _ in range(copies) for i in plain], torch.cat([images, *more])
