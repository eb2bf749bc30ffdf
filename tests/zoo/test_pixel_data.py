"""Small images are read as what they are, or refused.

They come in arrays and files. A refusal is one line, and nothing trains on black.
"""

import gzip
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from fewstep.zoo.arrays import labels_of, pixels
from fewstep.zoo.pixel_data import FASHION, FASHION_BEGINS, IDX, IDX_LABELS, LabelledImages, read_pixel_data

from .common import IMAGES

LABELS = np.array([0, 0, 1, 1, 2, 2])
NAMES = np.array(["dog", "cat", "ship"])


def npz(folder: Path, **arrays: Any) -> LabelledImages:
    np.savez(folder / "set.npz", **arrays)
    return read_pixel_data(str(folder / "set.npz"))


def channels_last(found: LabelledImages) -> np.ndarray:
    return found.images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    "images",
    [
        IMAGES,
        IMAGES.transpose(0, 3, 1, 2),
        IMAGES.astype(np.int64),
        IMAGES.astype(np.float32),
        IMAGES / 255,
        (IMAGES / 255).astype(np.float16),
        IMAGES / 127.5 - 1,
        (IMAGES / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2),
    ],
    ids=[
        "bytes",
        "channels first",
        "int64",
        "floats to 255",
        "floats to 1",
        "half",
        "from -1",
        "from -1, channels first",
    ],
)
def test_the_same_images_however_they_are_counted(tmp_path: Path, images: np.ndarray) -> None:
    assert np.array_equal(channels_last(npz(tmp_path, images=images)), IMAGES)


def test_grey_and_clear_images(tmp_path: Path) -> None:
    grey = IMAGES[..., 0]
    for images in (grey, grey[..., None], grey[:, None], grey / 255):
        assert np.array_equal(npz(tmp_path, images=images).images.numpy()[:, 0], grey)
    clear = np.concatenate([IMAGES, np.zeros((6, 8, 8, 1), np.uint8)], 3)
    assert int(npz(tmp_path, images=clear).images.min()) == 255
    assert npz(tmp_path, images=grey > 100).images.unique().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("labels", "classes", "numbers", "names"),
    [
        (LABELS[:, None], None, LABELS, ("0", "1", "2")),
        (np.eye(3)[LABELS], None, LABELS, ("0", "1", "2")),
        (np.eye(4, dtype=bool)[LABELS], None, LABELS, ("0", "1", "2", "3")),
        (LABELS.astype(np.float32), NAMES, LABELS, tuple(NAMES)),
        (LABELS.astype(np.uint8), np.char.encode(NAMES), LABELS, tuple(NAMES)),
        (NAMES[LABELS], None, [1, 1, 0, 0, 2, 2], ("cat", "dog", "ship")),
        (np.char.encode(NAMES)[LABELS], NAMES, LABELS, tuple(NAMES)),
        (NAMES[LABELS][:, None], NAMES, LABELS, tuple(NAMES)),
    ],
    ids=["keras", "one-hot", "one-hot of four", "floats", "names as bytes", "texts", "texts as bytes", "texts, keras"],
)
def test_labels_of_every_make(
    tmp_path: Path, labels: np.ndarray, classes: Any, numbers: Any, names: tuple[str, ...]
) -> None:
    found = npz(tmp_path, images=IMAGES, labels=labels, **({} if classes is None else {"classes": classes}))
    assert found.labels.tolist() == list(numbers)
    assert found.classes == names


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": IMAGES[:0]}, r"images is of shape \[0, 8, 8, 3\]"),
        ({"images": IMAGES[0]}, r"one image rather than"),
        ({"images": IMAGES.reshape(6, -1)}, r"is of shape \[6, 192\]"),
        ({"images": IMAGES[..., :2]}, r"allowed are 1, 3 or 4 channels"),
        ({"images": IMAGES[:, :4]}, r"are 8x4, allowed are square ones"),
        ({"images": (IMAGES - 128.0) / 64}, r"goes from -2 to 1\.98438 in float64"),
        ({"images": IMAGES / 16}, r"goes from 0 to 15\.9375 in float64"),
        ({"images": IMAGES > 100, "labels": [0] * 5}, r"labels is of shape \[5\] for 6 images"),
        ({"images": (IMAGES > 100).astype(np.uint8)}, r"goes from 0 to 1 in uint8"),
        ({"images": (IMAGES > 100).astype(np.int64)}, r"goes from 0 to 1 in int64"),
        ({"images": IMAGES.astype(np.uint16) * 257}, r"goes from 0 to 65535 in uint16"),
        ({"images": IMAGES.astype(np.int8)}, r"goes from -128 to 127 in int8"),
        ({"images": np.where(IMAGES > 3, IMAGES / 255, np.nan)}, r"not finite"),
        ({"images": np.zeros_like(IMAGES)}, r"goes from 0 to 0 in uint8"),
        ({"images": IMAGES.astype(complex)}, r"holds complex128"),
        (
            {"images": np.array([IMAGES, None], dtype=object)},
            r"cannot be read as npz \(Object arrays cannot be loaded",
        ),
        (
            {"images": IMAGES, "labels": np.array([None] * 6)},
            r"cannot be read as npz \(Object arrays cannot be loaded",
        ),
        ({"images": IMAGES, "labels": [-1, 0, 1, 1, 2, 2]}, r"labels goes from -1 to 2"),
        ({"images": IMAGES, "labels": [0.5, 0, 1, 1, 2, 2]}, r"no whole numbers"),
        ({"images": IMAGES, "labels": [10**12, 0, 1, 1, 2, 2]}, r"goes from 0 to 1000000000000"),
        ({"images": IMAGES, "labels": 3}, r"labels is of shape \[\]"),
        ({"images": IMAGES, "y": np.full((6, 3), 1 / 3)}, r"y is of shape \[6, 3\] and not one-hot"),
        ({"images": IMAGES, "labels": LABELS, "classes": ["a"]}, r"the labels need 3 names"),
        ({"images": IMAGES, "labels": LABELS, "classes": ["a", "b", "a"]}, r"the name 'a', which is there twice"),
        ({"images": IMAGES, "labels": LABELS, "classes": ["a", "", "b"]}, r"the name '', which"),
        ({"images": IMAGES, "labels": LABELS, "classes": ["a\nb", "c", "d"]}, r"the name 'a\\\\nb', which"),
        (
            {"images": IMAGES, "labels": NAMES[LABELS], "classes": ["dog", "cat"]},
            r"the label 'ship', which is not among",
        ),
        ({"images": IMAGES, "classes": NAMES}, r"has classes and no labels"),
        ({"jpeg": np.zeros(9, np.uint8), "offset": [0, 20]}, r"jpeg is not bytes"),
        ({"jpeg": np.zeros(9, np.uint8), "offset": [5, 2]}, r"jpeg is not bytes"),
        ({"jpeg": np.zeros(9, np.uint8), "offset": [0.0, 9.0]}, r"jpeg is not bytes"),
        ({"jpeg": np.zeros(9, np.uint8), "offset": [0, 4, 9]}, r"image 0 is no image"),
        ({"x": IMAGES}, r"holds x; it needs images"),
    ],
)
def test_what_would_be_a_guess_is_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^data: [^\n]*{said}[^\n]*$"):
        npz(tmp_path, **arrays)


def test_pickles_beside_the_images_are_left_alone(tmp_path: Path) -> None:
    assert npz(tmp_path, images=IMAGES, labels=LABELS, meta=np.array([{"a": 1}], dtype=object)).classes == (
        "0",
        "1",
        "2",
    )


def test_files_that_unpack_to_more_than_images_do(tmp_path: Path) -> None:
    """A megabyte that stands for gigabytes is not unpacked."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (10_000, 200, 200, 3)}
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("images.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(70):
            file.write(bytes(4_000_000))
    with pytest.raises(ValueError, match=r"^data: .*images\.npy claims 280,000,128 bytes in [\d,]+ packed ones"):
        read_pixel_data(str(tmp_path / "bomb.npz"))
    sizes = b"".join(n.to_bytes(4, "big") for n in (30_000, 1000, 1000))
    (tmp_path / IDX).write_bytes(gzip.compress(b"\0\0\x08\x03" + sizes))
    with pytest.raises(ValueError, match=r"^data: .*ubyte\.gz claims 30,000,000,000 bytes in \d+ packed ones"):
        read_pixel_data(str(tmp_path))


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    head = bytes([0, 0, kind, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def test_digits_are_not_called_clothes(tmp_path: Path) -> None:
    """MNIST's files have the names of Fashion-MNIST's; their labels begin otherwise."""
    images, clothes = np.repeat(IMAGES[..., 0], 2, axis=0), [*FASHION_BEGINS, 1, 1]
    for labels, names in ((clothes, FASHION), ([5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5], tuple("0123456789"))):
        (tmp_path / IDX).write_bytes(idx(images))
        (tmp_path / IDX_LABELS).write_bytes(idx(np.array(labels)))
        assert read_pixel_data(str(tmp_path)).classes == names


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (idx(IMAGES[..., 0])[:100], "ended before the end-of-stream"),
        (idx(IMAGES[..., 0])[:-8] + bytes(8), "CRC check failed"),
        (idx(IMAGES[..., 0], 13), "no IDX file of bytes"),
        (idx(IMAGES[:, 0, :, 0]), r"has images \[6, 8\] and labels \[6\]"),
        (idx(IMAGES[:5, ..., 0]), r"has images \[5, 8, 8\] and labels \[6\]"),
        (gzip.compress(b"\0\0\x08"), "no IDX file of bytes"),
        (gzip.compress(b"\0\0\x08\x09" + b"\0\0\0\1" * 9), "no IDX file of bytes"),
        (gzip.compress(gzip.decompress(idx(IMAGES[..., 0])) + b"x"), r"holds more than its header says, \[6, 8, 8\]"),
        (gzip.compress(gzip.decompress(idx(IMAGES[..., 0]))[:-3]), r"holds less than its header says"),
        (b"hello", "Not a gzipped file"),
        (b"", "no IDX file of bytes"),
    ],
    ids=range(11),  # bytes that say when they were compressed
)
def test_damaged_idx_files(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / IDX).write_bytes(data)
    (tmp_path / IDX_LABELS).write_bytes(idx(LABELS))
    with pytest.raises(ValueError, match=rf"^data: [^\n]*{said}[^\n]*$"):
        read_pixel_data(str(tmp_path))


def folder(root: Path, **files: np.ndarray | bytes) -> Path:
    for name, data in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            Image.fromarray(data).save(path)
    return root


def test_folders_in_folders_and_shadows(tmp_path: Path) -> None:
    root = folder(
        tmp_path / "set",
        **{
            "cat__x__0.png": IMAGES[0],
            "dog__1.PNG": IMAGES[1],
            ".cache__2.png": IMAGES[2],
            "__MACOSX__dog__1.png": b"x",
        },
    )
    found = read_pixel_data(str(root))
    assert (found.labels.tolist(), found.classes) == ([0, 1], ("cat", "dog"))
    wide = IMAGES[0, ..., 0].astype(np.uint16) * 257
    assert np.array_equal(
        read_pixel_data(str(folder(tmp_path / "wide", **{"a.png": wide}))).images[0, 0].numpy(), IMAGES[0, ..., 0]
    )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"2.png": IMAGES[1]}, r"has images beside the classes' folders, e\.g\. 2\.png"),
        ({"dog__readme.txt": b"x"}, "dog is among the classes' folders and has no images"),
        ({"cat__2.png": b"x"}, r"cat/2\.png is no image"),
        ({"cat__2.png": IMAGES[1][:4]}, r"of several sizes, \(8, 8\) and \(4, 8\) \(cat/2\.png\)"),
    ],
)
def test_folders_that_are_no_classes(tmp_path: Path, files: dict[str, np.ndarray | bytes], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^data: [^\n]*{said}"):
        read_pixel_data(str(folder(tmp_path / "set", **{"cat__1.png": IMAGES[0], **files})))


@pytest.mark.parametrize("name", ["set.npz", IDX, "a.png"])
def test_pipes_do_not_hang_it(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=r"is a pipe or a device, not a file"):
        read_pixel_data(str(tmp_path / name if name.endswith("npz") else tmp_path))


SHAPES = st.sampled_from([(6, 8, 8, 3), (6, 3, 8, 8), (6, 8, 8), (6, 8, 8, 1), (6, 8, 8, 4)])
RANGES = st.sampled_from([(0, 1), (-1, 1), (0, 255), (0, 3), (-3, 3), (0, 65535)])
KINDS = st.sampled_from([np.uint8, np.int16, np.int64, np.float16, np.float32, np.float64, np.complex64])


@given(shape=SHAPES, bounds=RANGES, kind=KINDS)
def test_arrays_are_images_of_some_brightness_or_one_line(
    shape: tuple[int, ...], bounds: tuple[int, int], kind: type
) -> None:
    noise = np.random.default_rng(0).random(shape)
    noise.flat[:2] = 0, 1
    with np.errstate(all="ignore"):
        array: np.ndarray = (bounds[0] + (bounds[1] - bounds[0]) * noise).astype(kind)
    assume((float(array.real.min()), float(array.real.max())) == bounds)  # the kind can count so far
    said = ""
    try:
        found = pixels(array, "x")
        assert found.shape[2:] == (8, 8) and found.shape[1] in (1, 3)
        assert 60 < found.float().mean() < 200
    except ValueError as error:
        said = str(error)
    assert not said or said.startswith("x ")


@given(
    st.lists(
        st.one_of(st.integers(-2, 10**6), st.floats(allow_nan=True), st.text("ab \n\0é", max_size=3)),
        min_size=3,
        max_size=3,
    )
)
def test_labels_are_classes_or_one_line(values: list[object]) -> None:
    said = ""
    try:
        numbers, names = labels_of(np.array(values), 3, "x")
        assert all(0 <= n < len(names) for n in numbers.tolist())
    except ValueError as error:
        said = str(error)
    assert not said or (said.startswith("x") and said.isprintable())
