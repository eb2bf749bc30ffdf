"""Reading of image files: upright, in RGB, on white.

Files whose colours cannot be known are refused. Colour profiles (ICC) are not applied: every image is taken
to be sRGB. The first frame of an animation is read.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from .texts import printable

KINDS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # by content; the suffix of a file may name another format
OTHERS = (
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".svg",
    ".psd",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".exr",
    ".hdr",
    ".tga",
    ".ico",
    ".ppm",
    ".pgm",
)
LARGEST = 178_956_970  # pixels; Pillow takes a larger image for a decompression bomb
PLAIN = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
ORIENTATION, WHITE_IS_ZERO, BITS = 0x0112, 262, 258  # tags of EXIF and TIFF
WHITE = (255, 255, 255, 255)


@contextmanager
def opened(source: bytes | BinaryIO, name: str, option: str = "data.source") -> Iterator[Image.Image]:
    """Open an image file within the block and read the header.

    Raises ValueError with one line, which names the file, for damage and for sizes or colours that are not
    read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd tags and of sizes; the sizes are checked below
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
                _require_readable(image)
                yield image
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{option}: {printable(name)} is no image of {', '.join(FORMATS)}, or damaged; remove it"
        ) from error
    except Exception as error:  # Pillow raises as many types as there are kinds of damage
        reason = printable(error).strip() or type(error).__name__
        raise ValueError(
            f"{option}: {printable(name)} cannot be read ({reason}); remove it, or save it again"
        ) from error


def _require_readable(image: Image.Image) -> None:
    if image.width * image.height > LARGEST:  # Pillow's own limit is a setting and may be off
        raise ValueError(f"it is {image.width}x{image.height} pixels, allowed are {LARGEST:,} in all")
    if image.mode not in PLAIN and not _sixteen_bits(image):
        raise ValueError(
            f"its pixels are of Pillow's mode {image.mode}, whose range no file says; "
            "allowed are 8 bits, or 16 without colour"
        )


def _sixteen_bits(image: Image.Image) -> bool:
    """Return whether an image is grey in 16 bits.

    Older versions of Pillow read 16-bit PNG as 32-bit numbers.
    """
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def in_colour(image: Image.Image) -> Image.Image:
    """Return an opened image as RGB of 8 bits.

    The image is rotated as the EXIF data say, 16 bits are divided by 257, and transparent parts become white.
    """
    wide, white_is_zero, bits = _sixteen_bits(image), False, 16
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        white_is_zero, bits = image.tag_v2.get(WHITE_IS_ZERO) == 0, image.tag_v2.get(BITS, (16,))[0]
    image.load()  # rotates TIFF already
    if image.getexif().get(ORIENTATION, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
    if wide:
        values = np.asarray(image).astype(np.int64)
        clear = values == image.info["transparency"] if isinstance(image.info.get("transparency"), int) else None
        grey = np.rint(values * (255 / (2**bits - 1))).clip(0, 255)
        grey = 255 - grey if white_is_zero else grey
        return Image.fromarray(
            np.where(clear, 255, grey).astype(np.uint8) if clear is not None else grey.astype(np.uint8)
        ).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), over).convert("RGB")
    return image.convert("RGB")


def squared(image: Image.Image, size: int) -> Tensor:
    """Return the central square of an RGB image, scaled.

    [3, size, size] in [0, 1].
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # Crop before scaling: a scaled strip of 1 by 10,000 pixels would take gigabytes.
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
