"""Small pictures with classes, from the files that people have: IDX, npz, a folder with one folder per class."""

import gzip
import io
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IDX = "train-images-idx3-ubyte.gz"
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class Pictures(NamedTuple):
    """`images [n, C, H, W]` bytes, `labels [n]`, and the classes' names (none: unconditional)."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


def read_pixel_data(source: str) -> Pictures:
    """Pictures of one size from a folder of gzipped IDX files (Fashion-MNIST), an npz, or a folder with one folder per class.

    npz: `images` [n, H, W, C] or `jpeg` (all bytes) and `offset` [n + 1]; `labels` or `y`, and `classes`. No pickles are read.
    Raises ValueError with one line where there is nothing of that kind.
    """
    path = Path(source)
    if path.suffix == ".npz":
        return _npz(path)
    if (path / IDX).exists() or not path.is_dir():
        return _idx(path)
    return _folder(path)


def _idx(folder: Path) -> Pictures:
    images = load_idx(folder / IDX)[:, None]
    labels = load_idx(folder / "train-labels-idx1-ubyte.gz").long()
    return Pictures(images, labels, FASHION)


def load_idx(path: Path) -> Tensor:
    """An IDX file of bytes. Raises ValueError when it is not there or not one."""
    try:
        data = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise ValueError(
            f"data: cannot read {path} ({error.strerror or error}); install Debian's dataset-fashion-mnist, or set data=PATH to a folder of pictures or an npz"
        ) from error
    ranks = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(ranks)]
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * ranks).reshape(shape).copy())


def _npz(path: Path) -> Pictures:
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {k: file[k] for k in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"data: {path} cannot be read as npz ({error}); pass another file") from error
    if "images" in parts:
        images = torch.from_numpy(parts["images"]).permute(0, 3, 1, 2).contiguous()
    elif {"jpeg", "offset"} <= parts.keys():
        bounds = parts["offset"].tolist()
        images = _stack([parts["jpeg"][a:b].tobytes() for a, b in pairwise(bounds)], str(path))
    else:
        raise ValueError(f"data: {path} holds {', '.join(parts)}; it needs images [n, H, W, C], or jpeg and offset")
    found = parts.get("labels", parts.get("y"))
    labels = torch.zeros(len(images), dtype=torch.long) if found is None else torch.from_numpy(found).long()
    count = 0 if found is None else int(labels.max()) + 1
    names = tuple(str(c) for c in parts["classes"]) if "classes" in parts else tuple(str(i) for i in range(count))
    return Pictures(images, labels, names)


def _folder(path: Path) -> Pictures:
    classes = sorted(p.name for p in path.iterdir() if p.is_dir())
    files = [(p, classes.index(p.parent.name) if classes else 0) for p in sorted(path.rglob("*")) if p.suffix.lower() in KINDS]
    if not files:
        raise ValueError(f"data: {path} has no pictures; allowed are {', '.join(KINDS)}, in one folder per class")
    return Pictures(_stack([p.read_bytes() for p, _ in files], str(path)), torch.tensor([c for _, c in files]), tuple(classes))


def _stack(files: list[bytes], source: str) -> Tensor:
    """Pictures of one size. Raises ValueError for others."""
    try:
        arrays = [np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files]
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"data: {source} holds something that is no picture ({error}); remove it") from error
    if sizes := {a.shape for a in arrays} - {arrays[0].shape}:
        raise ValueError(
            f"data: the pictures of {source} are of several sizes, {arrays[0].shape[:2]} and {min(sizes)[:2]}; bring them to one"
        )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
