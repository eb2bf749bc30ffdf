"""Image files of every mode that programs write: their colours are right, or they are refused by name."""

import ast
import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewstep.data.image_files import LARGEST, in_colour, opened, squared

from ..project import ROOT

GREY16 = np.array([[0, 65535], [32896, 257]], np.uint16)
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6


def stored(image: Image.Image | np.ndarray, kind: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **how)
    return buffer.getvalue()


def colours(data: bytes) -> np.ndarray:
    with opened(data, "x.png") as image:
        return np.asarray(in_colour(image))


def plain(mode: str, colour: int | tuple[int, ...], kind: str = "PNG", **how: object) -> list[int]:
    """The colour in which one of this colour in this mode is read."""
    return colours(stored(Image.new(mode, (3, 2), colour), kind, **how))[1, 2].tolist()


def test_every_mode_has_its_colours() -> None:
    white, red = [255] * 3, [255, 0, 0]
    assert plain("1", 1) == plain("L", 255) == plain("LA", (0, 0)) == plain("RGBA", (255, 0, 0, 0)) == white
    assert plain("RGBA", (255, 0, 0, 128)) == [255, 127, 127]
    assert (
        plain("P", 0, transparency=0)
        == plain("L", 7, transparency=7)
        == plain("RGB", (1, 2, 3), transparency=(1, 2, 3))
        == white
    )
    assert plain("CMYK", (0, 255, 255, 0), "JPEG") == plain("CMYK", (0, 255, 255, 0), "TIFF") == red
    assert plain("P", 0, "GIF") == [0, 0, 0]


def test_sixteen_bits_of_grey_are_scaled() -> None:
    """Not clipped, which makes all but the darkest white."""
    for kind in ("PNG", "TIFF"):
        assert colours(stored(GREY16, kind))[..., 1].tolist() == [[0, 255], [128, 1]]
    assert colours(stored(GREY16, "TIFF", tiffinfo={262: 0}))[..., 0].tolist() == [[255, 0], [127, 254]]
    assert colours(stored(GREY16, "PNG", transparency=0))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_images_are_turned_as_they_were_taken(kind: str) -> None:
    left_white = np.zeros((16, 32, 3), np.uint8)
    left_white[:, :8] = 255
    upright = colours(stored(left_white, kind, exif=SIDEWAYS))
    assert upright.shape == (32, 16, 3)
    assert upright[:6].min() > 240 and upright[10:].max() < 15


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_whose_range_no_file_says_are_refused(kind: type) -> None:
    with pytest.raises(
        ValueError, match=r"^data\.source: x\.png cannot be read \(its pixels are of Pillow's mode [FI], whose range"
    ):
        colours(stored(np.ones((2, 2), kind), "TIFF"))


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that unpacks to this size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("limit", [None, 89_478_485])
def test_huge_images_are_refused_whatever_pillow_allows(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert LARGEST < 20_000 * 20_000
    with pytest.raises(ValueError, match=r"^data\.source: x\.png cannot be read \([^\n]*pixels[^\n]*\); remove it"):
        colours(bomb(20_000, 20_000))
    with opened(stored(Image.new("L", (1, 20_000), 9), "PNG"), "strip") as image:
        assert squared(in_colour(image), 512).shape == (3, 512, 512)


WHOLE = stored(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8), "PNG")


@given(at=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_file_is_a_image_or_one_line_with_its_name(at: int, byte: int, cut: bool) -> None:
    said = ""
    try:
        assert colours(WHOLE[:at] if cut else WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :]).shape[2] == 3
    except ValueError as error:
        said = str(error)
    assert not said or (said.startswith("data.source: x.png ") and said.isprintable())


def test_programs_that_pillow_would_start_are_not() -> None:
    """Only formats of images are tried: PostScript with an image's suffix would go to Ghostscript."""
    with pytest.raises(ValueError, match="is no image of PNG, JPEG"):
        colours(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_images_are_opened_in_one_place() -> None:
    """Those of others; a report and a notebook read the grids that fewstep wrote itself."""

    def opens(tree: ast.AST) -> Sequence[ast.AST]:
        return [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute) and ast.unparse(n) in ("Image.open", "PIL.Image.open")
        ]

    package = ROOT / "src" / "fewstep"
    found = {
        f.relative_to(package).as_posix()
        for f in package.rglob("*.py")
        if opens(ast.parse(f.read_text(encoding="utf-8")))
    }
    assert found == {"data/image_files.py", "report/grids.py", "notebook.py"}
