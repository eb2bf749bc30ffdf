"""Real pictures with captions, from a folder or webdataset shards: for fine-tuning a teacher and for the adversarial term."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from torch import Tensor

from ..atomic import read_tensors, write_tensors
from ..backbones.base import Backbone
from ..methods.method import Real
from .prompts import Embeddings, embed

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LISTS = ("metadata.jsonl", "captions.jsonl")


@dataclass(frozen=True)
class Captioned:
    """One picture that has not been decoded yet."""

    name: str
    data: bytes
    caption: str


def read_pictures(source: str) -> Iterator[Captioned]:
    """Pictures of a folder or of webdataset `.tar` shards (one file, or a folder of them), in a fixed order.

    Captions of a folder: `metadata.jsonl` with `file_name` and `text`, a `.txt` beside the picture, or else the file's name.
    In a shard: the `.txt`, or `caption` or `text` of the `.json`, of the same key. Raises ValueError with one line where there is none.
    """
    path = Path(source)
    shards = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar"))
    if not path.exists():
        raise ValueError(f"data.source: there is no {source}; pass a folder of pictures or of webdataset .tar files")
    found = False
    for picture in (p for shard in shards for p in _shard(shard)) if shards else _folder(path):
        found = True
        yield picture
    if not found:
        raise ValueError(f"data.source: {source} has no pictures; allowed are {', '.join(KINDS)}, or .tar files that hold them")


def _folder(path: Path) -> Iterator[Captioned]:
    captions = {}
    for listing in (path / name for name in LISTS if (path / name).is_file()):
        for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                captions[row["file_name"]] = str(row.get("text", row.get("caption", "")))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f'data.source: line {number} of {listing} is not {{"file_name": ..., "text": ...}}; correct it') from error
    for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in KINDS):
        beside = file.with_suffix(".txt")
        plain = beside.read_text(encoding="utf-8").strip() if beside.is_file() else file.stem.replace("_", " ")
        name = file.relative_to(path).as_posix()
        yield Captioned(name, file.read_bytes(), captions.get(name, plain))


def _shard(path: Path) -> Iterator[Captioned]:
    """A webdataset shard: files of one key lie next to each other."""
    try:
        with tarfile.open(path) as tar:
            parts: dict[str, bytes] = {}
            key = None
            for member in tar:
                stem, _, kind = member.name.rpartition("/")[2].partition(".")
                here = f"{member.name.rpartition('/')[0]}/{stem}"
                if here != key:
                    yield from _sample(path, key, parts)
                    key, parts = here, {}
                if (file := tar.extractfile(member)) is not None:
                    parts["." + kind.lower()] = file.read()
            yield from _sample(path, key, parts)
    except tarfile.TarError as error:
        raise ValueError(f"data.source: {path} is no tar file, or damaged ({str(error).splitlines()[0].rstrip(':')})") from error


def _sample(path: Path, key: str | None, parts: dict[str, bytes]) -> Iterator[Captioned]:
    kind = next((k for k in KINDS if k in parts), None)
    if key is None or kind is None:
        return
    about = json.loads(parts.get(".json", b"{}"))
    caption = parts[".txt"].decode() if ".txt" in parts else str(about.get("caption", about.get("text", "")))
    yield Captioned(f"{path.name}:{key}{kind}", parts[kind], caption.strip())


def to_tensor(picture: Captioned, size: int) -> Tensor:
    """[3, size, size] in [0, 1]: the shorter side scaled to `size`, the middle cut out, transparency on white."""
    try:
        image = Image.open(io.BytesIO(picture.data)).convert("RGBA")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"data.source: {picture.name} is no picture ({error}); remove it") from error
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.LANCZOS)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    flat = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return torch.from_numpy(np.array(flat)).permute(2, 0, 1).float() / 255


class RealData:
    """Clean states of real pictures and their conditions, encoded once and kept on the CPU."""

    def __init__(self, x0: Tensor, embeddings: Embeddings, key: str) -> None:
        self.x0, self.embeddings = x0, embeddings
        self.key = key  # a hash of the encoders' identity, the pictures and the captions

    def __len__(self) -> int:
        return len(self.x0)

    def draw(self, batch: int, rng: torch.Generator, device: torch.device) -> Real:
        """A batch drawn at random, each picture with its own caption."""
        rows = torch.randint(len(self), (batch,), generator=rng)
        return Real(self.x0[rows].to(device), {k: v[rows].to(device) for k, v in self.embeddings.cond.items()})


def encode_pictures(backbone: Backbone, source: str, cache: Path | None, identity: str, chunk: int = 32) -> RealData:
    """Encode the real pictures of `source`, once: `cache` is a folder, `identity` names the encoders.

    Raises ValueError for a backbone without pictures.
    """
    if not (size := backbone.picture_size):
        raise ValueError(f"data.source: the states of {backbone.name} are no pictures; leave it out")
    pictures = list(read_pictures(source))
    digest = hashlib.sha256(json.dumps([identity, size]).encode())
    for p in pictures:
        digest.update(json.dumps([p.name, p.caption]).encode() + hashlib.sha256(p.data).digest())
    key = digest.hexdigest()[:24]
    embeddings = embed(backbone, [p.caption for p in pictures], cache, identity)

    def encode() -> Tensor:
        return torch.cat([backbone.picture_states(part).cpu() for part in _chunks(pictures, size, chunk)])

    return RealData(made_once(None if cache is None else cache / f"pictures-{key}.safetensors", encode), embeddings, key)


def made_once(path: Path | None, make: Callable[[], Tensor]) -> Tensor:
    """The states kept in `path`, or made and kept there; a damaged file is made again."""
    if path is not None and path.exists():
        try:
            return read_tensors(path)[0]["x0"]
        except (SafetensorError, KeyError):
            path.unlink()
    x0 = make()
    if path is not None:
        write_tensors(path, {"x0": x0})
    return x0


def _chunks(pictures: Sequence[Captioned], size: int, chunk: int) -> Iterator[Tensor]:
    for i in range(0, len(pictures), chunk):
        yield torch.stack([to_tensor(p, size) for p in pictures[i : i + chunk]])
