"""Small images with classes, from the files that people have.

IDX, npz, or a folder with one folder per class.
"""

import gzip
import math
import zipfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.folders import files_in, hidden
from ..data.image_files import KINDS, in_colour, opened
from ..data.texts import printable, require_regular
from ..reading import ReadError, reading
from .arrays import DARK, class_names, labels_of, pixels

IDX, IDX_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION_BEGINS = (9, 0, 0, 3, 0, 2, 7, 2, 5, 5)  # first labels: MNIST's digits are in files of the same names
SMALL, DENSE = 2**28, 200  # bytes that are always unpacked; above, the largest ratio of unpacked to packed bytes
CURE = "install Debian's dataset-fashion-mnist, or set data=PATH to a folder of images or an npz"


class LabelledImages(NamedTuple):
    """Images with labels and class names.

    `images` [n, C, H, W] are bytes, `labels` [n]. `classes` is empty for unconditional data.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


def read_pixel_data(source: str) -> LabelledImages:
    """Read square images of one size from IDX, npz or folders.

    The source is a folder of gzipped IDX files (Fashion-MNIST), an npz, or a folder with one folder per
    class. An npz has `images` (see `arrays.pixels`), or `jpeg` (all bytes) and `offset` [n + 1]; and `labels`
    or `y` (see `arrays.labels_of`), and `classes`. No pickles are read. Raises ValueError with one line for
    other sources, and for damaged ones.
    """
    path = Path(source)
    if path.suffix.lower() == ".npz":
        found = _npz(path)
    elif (path / IDX).exists() or not path.is_dir():
        found = _idx(path)
    else:
        found = _folder(path)
    height, width = found.images.shape[2:]
    if height != width:
        raise ValueError(
            f"data: the images of {printable(source)} are {width}x{height}, allowed are square ones; cut them"
        )
    if (brightest := int(found.images.max())) < DARK:
        raise ValueError(
            f"data: the brightest byte of {printable(source)} is {brightest} of 255, all is black; scale it"
        )
    return found


def _idx(folder: Path) -> LabelledImages:
    images, labels = load_idx(folder / IDX), load_idx(folder / IDX_LABELS)
    if images.ndim != 3 or 0 in images.shape or labels.shape != images.shape[:1]:
        raise ValueError(
            f"data: {printable(folder)} has images {list(images.shape)} and labels {list(labels.shape)}, "
            "which are not [n, H, W] and [n]; download them again"
        )
    numbers, names = labels_of(labels.numpy(), len(images), f"data: {printable(folder / IDX_LABELS)}")
    known = tuple(numbers[:10].tolist()) == FASHION_BEGINS and len(names) == len(FASHION)
    return LabelledImages(images[:, None], numbers, FASHION if known else names)


def load_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes.

    Raises ValueError where the file is missing, is no IDX file, or does not hold what its header says.
    """
    where = f"data: {printable(path)}"
    packed = require_regular(path, "data", CURE).stat().st_size
    with reading(where, CURE, "cannot be read"), gzip.open(path) as file:
        begin = file.read(4)
        if len(begin) < 4 or begin[:3] != b"\0\0\x08" or not 1 <= begin[3] <= 4:
            raise ReadError(f"{where} is no IDX file of bytes (it begins with {begin.hex()}); {CURE}")
        shape = [int.from_bytes(file.read(4), "big") for _ in range(begin[3])]
        _require_dense(math.prod(shape), packed, where)
        data = file.read(math.prod(shape) + 1)
    if len(data) != math.prod(shape):
        raise ValueError(
            f"{where} holds {'more' if len(data) > math.prod(shape) else 'less'} than its header says, "
            f"{shape}; download it again"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape).copy())


def _require_dense(size: int, packed: int, where: str) -> None:
    """Check that a file unpacks to no more than images do.

    Raises ValueError otherwise.
    """
    if size > SMALL and size > DENSE * packed:
        raise ReadError(
            f"{where} claims {size:,} bytes in {packed:,} packed ones, more than images have; check where it is from"
        )


def _npz(path: Path) -> LabelledImages:
    where = f"data: {printable(path)}"
    require_regular(path, "data", "pass an npz")
    with reading(where, "pass another file", "cannot be read as npz"), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    for entry in entries:
        _require_dense(entry.file_size, entry.compress_size, f"{where}: {printable(entry.filename)}")
    with reading(where, "pass another file", "cannot be read as npz"), np.load(path, allow_pickle=False) as file:
        names = list(file.files)
        kinds = {
            k: next((n for n in ns if n in names), None)
            for k, ns in {"images": ("images",), "labels": ("labels", "y")}.items()
        }
        wanted = [n for n in (*kinds.values(), "jpeg", "offset", "classes") if n in names]
        parts = {n: file[n] for n in wanted}
    if "images" in parts:
        images = pixels(parts["images"], f"{where}: images")
    elif {"jpeg", "offset"} <= parts.keys():
        images = _stack(_files(parts["jpeg"], parts["offset"], where), where)
    else:
        raise ValueError(
            f"{where} holds {', '.join(map(printable, names)) or 'nothing'}; "
            "it needs images [n, H, W, C], or jpeg and offset"
        )
    of = kinds["labels"]
    if of is None:
        if "classes" in parts:
            raise ValueError(f"{where} has classes and no labels; add labels [{len(images)}], or leave classes out")
        return LabelledImages(images, torch.zeros(len(images), dtype=torch.long), ())
    labels, classes = labels_of(parts[of], len(images), f"{where}: {of}", parts.get("classes"))
    return LabelledImages(images, labels, classes)


def _files(data: np.ndarray, offset: np.ndarray, where: str) -> Iterable[tuple[str, bytes]]:
    """Return (name, bytes) of image files that follow each other.

    Raises ValueError for offsets that do not rise from 0 to N at most.
    """
    bounds = offset.tolist() if offset.ndim == 1 and offset.dtype.kind in "ui" else []
    if (
        data.ndim != 1
        or data.dtype != np.uint8
        or len(bounds) < 2
        or bounds[0] < 0
        or bounds[-1] > len(data)
        or bounds != sorted(bounds)
    ):
        raise ValueError(f"{where}: jpeg is not bytes [N] with rising offset [n + 1] from 0 to N; save them so")
    return ((f"image {i}", data[a:b].tobytes()) for i, (a, b) in enumerate(pairwise(bounds)))


def _folder(path: Path) -> LabelledImages:
    files = list(files_in(path, KINDS, "data"))
    if not files:
        raise ValueError(
            f"data: {printable(path)} has no images; allowed are {', '.join(KINDS)}, in one folder per class"
        )
    of = [name.partition("/")[0] if "/" in name else "" for name, _ in files]
    classes = sorted(set(of))
    if "" in classes and len(classes) > 1:
        raise ValueError(
            f"data: {printable(path)} has images beside the classes' folders, "
            f"e.g. {printable(files[of.index('')][0])}; move them into one"
        )
    if bare := sorted(
        p.name
        for p in path.iterdir()
        if p.is_dir() and not hidden(p.name) and classes != [""] and p.name not in classes
    ):
        raise ValueError(
            f"data: {printable(path / bare[0])} is among the classes' folders and has no images; remove it"
        )
    names = class_names(classes, len(classes), f"data: {printable(path)}") if classes != [""] else ()
    images = _stack(((name, file.read_bytes()) for name, file in files), f"data: {printable(path)}")
    return LabelledImages(images, torch.tensor([classes.index(c) for c in of]), names)


def _stack(files: Iterable[tuple[str, bytes]], where: str) -> Tensor:
    """Stack images of one size as bytes [n, 3, H, W].

    Raises ValueError for images of several sizes, and for what is no image.
    """
    arrays: list[np.ndarray] = []
    for name, data in files:
        with opened(data, name, where) as image:
            arrays.append(np.asarray(in_colour(image)))
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(
                f"{where}: the images are of several sizes, {arrays[0].shape[:2]} and {arrays[-1].shape[:2]} "
                f"({printable(name)}); bring them to one"
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
