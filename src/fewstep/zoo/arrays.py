"""Arrays of images and labels, in the forms that people save.

Images become bytes [n, C, H, W], labels become numbers of classes. An array that could be read in several
ways is refused.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, from_numpy

from ..data.texts import printable, text_of

PART = 1024  # images whose floats are converted to bytes at once
CHANNELS = (1, 3, 4)
MOST_CLASSES = 100_000
NEAR = 1e-3  # what rounding may add to a range
DARK = 64  # smallest maximum of a whole set: with a lower one, bytes are in other units (digits in 0..16)


def pixels(array: np.ndarray, where: str) -> Tensor:
    """Convert images to bytes [n, C, H, W], C 1 or 3.

    The images are [n, H, W], [n, H, W, C] or [n, C, H, W]. Transparency (C = 4) is put on white. Numbers may
    be bytes, whole ones in 0..255, or floats in 0..1, -1..1 or 0..255. Raises ValueError, beginning with
    `where`, for all else.
    """
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(
            f"{where} is of shape {list(array.shape)}, "
            "allowed are images [n, H, W, C], [n, C, H, W] or [n, H, W]; reshape it"
        )
    if array.ndim == 3:
        if array.shape[2] in CHANNELS:
            raise ValueError(
                f"{where} is of shape {list(array.shape)}, one image rather than [n, H, W, C]; stack several"
            )
        array = array[..., None]
    elif array.shape[3] not in CHANNELS:
        if array.shape[1] not in CHANNELS:
            raise ValueError(
                f"{where} is of shape {list(array.shape)}, allowed are 1, 3 or 4 channels, last or second; convert it"
            )
        array = array.transpose(0, 2, 3, 1)
    scale, shift = _range(array, where)
    parts = [_in_bytes(array[i : i + PART], scale, shift) for i in range(0, len(array), PART)]
    return from_numpy(np.ascontiguousarray(np.concatenate(parts).transpose(0, 3, 1, 2)))


def _in_bytes(part: np.ndarray, scale: float, shift: float) -> np.ndarray:
    if part.dtype != np.uint8:
        part = np.rint(part.astype(np.float64) * scale + shift).clip(0, 255).astype(np.uint8)
    if part.shape[3] == 4:
        share = part[..., 3:] / 255
        part = np.rint(part[..., :3] * share + 255 * (1 - share)).astype(np.uint8)
    return part


def _range(array: np.ndarray, where: str) -> tuple[float, float]:
    """Return (scale, shift) from an array's numbers to 0..255.

    Raises ValueError where the range of the numbers is not clear.
    """
    if array.dtype.kind not in "buif":
        raise ValueError(f"{where} holds {array.dtype}, allowed are numbers; save images as bytes (uint8)")
    low, high = float(array.min()), float(array.max())
    if array.dtype == np.bool_:
        return 255.0, 0.0
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{where} holds numbers that are not finite; repair it")
    if array.dtype.kind == "f" and low >= -NEAR and 0.5 < high <= 1 + NEAR:
        return 255.0, 0.0
    if array.dtype.kind == "f" and -1 - NEAR <= low < -0.5 and high <= 1 + NEAR:
        return 127.5, 127.5
    if low >= 0 and DARK <= high <= 255:
        return 1.0, 0.0
    raise ValueError(
        f"{where} goes from {low:g} to {high:g} in {array.dtype}, allowed are 0 to 255, "
        "or floats from 0 to 1 or from -1 to 1; scale it to bytes (uint8)"
    )


def labels_of(
    array: np.ndarray, count: int, where: str, classes: np.ndarray | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Return (numbers [n] from 0, names) of `count` images' labels.

    Labels are [n], [n, 1] as in Keras, or one-hot [n, k]. Texts are numbered as in `classes`, or else in
    alphabetical order. The names of numbers are `classes`, or else the numbers themselves. Raises ValueError,
    beginning with `where`, for all else.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind in "US" and array.shape == (count,):
        known = class_names(np.unique(array) if classes is None else classes, 1, where)
        number = {name: i for i, name in enumerate(known)}
        given = [text_of(v, where) for v in _texts(array)]
        if (unknown := next((v for v in given if v not in number), None)) is not None:
            raise ValueError(
                f"{where} has the label {printable(unknown)!r}, which is not among the classes; add it there"
            )
        return from_numpy(np.array([number[v] for v in given], np.int64)), known
    numbers = _numbers(array, count, where)
    least = int(numbers.max()) + 1 if array.ndim == 1 else array.shape[1]
    return numbers, tuple(map(str, range(least))) if classes is None else class_names(
        classes, least, f"{where} with classes"
    )


def _numbers(array: np.ndarray, count: int, where: str) -> Tensor:
    if array.ndim not in (1, 2) or len(array) != count:
        raise ValueError(
            f"{where} is of shape {list(array.shape)} for {count} images; pass one label for each, [{count}]"
        )
    if array.ndim == 2:
        if array.dtype.kind not in "buif" or not np.isin(array, (0, 1)).all() or not (array.sum(1) == 1).all():
            raise ValueError(
                f"{where} is of shape {list(array.shape)} and not one-hot; pass one label for each image, [{count}]"
            )
        return from_numpy(array.argmax(1))
    if array.dtype.kind not in "buif" or not np.isfinite(array).all() or not (array == np.floor(array)).all():
        raise ValueError(f"{where} holds {array.dtype} that are no whole numbers; number the classes from 0")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= MOST_CLASSES:
        raise ValueError(
            f"{where} goes from {low} to {high}, allowed are whole numbers from 0, below {MOST_CLASSES:,}; "
            "number the classes from 0"
        )
    return from_numpy(array.astype(np.int64))


def class_names(array: np.ndarray | Sequence[str], least: int, where: str) -> tuple[str, ...]:
    """Return class names for which a prompt can ask.

    Raises ValueError for arrays of another shape, for fewer than `least` names, and for a name that is there
    twice, is empty or has several lines.
    """
    array = np.asarray(array)
    if array.ndim != 1 or array.dtype.kind not in "USiu" or len(array) < least:
        raise ValueError(
            f"{where} is {array.dtype} of shape {list(array.shape)}, the labels need {least} names; "
            "pass them as texts, in the labels' order"
        )
    names = tuple(text_of(v, where) for v in _texts(array))
    if (odd := next((n for n in names if not n or not n.isprintable() or names.count(n) > 1), None)) is not None:
        raise ValueError(
            f"{where} has the name {printable(odd)!r}, which is there twice, is empty or is no plain line; rename it"
        )
    return names


def _texts(array: np.ndarray) -> list[str]:
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in array.tolist()]
