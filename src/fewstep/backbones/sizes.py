"""Sizes of images and videos, as recipes and cards have them.

A number is the height and width of images in pixels. A text is that of videos: `832x480x81` is width, height and
frames. 0 is the model's own size.
"""

import re
from typing import NamedTuple

Size = int | str


class VideoSize(NamedTuple):
    """Pixels and frames of a video."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


def video_size(size: Size) -> VideoSize:
    """Read `WIDTHxHEIGHTxFRAMES`.

    Raises ValueError for another text.
    """
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})x(\d{1,5})", str(size))
    if found is None:
        raise ValueError(f"size: got {size}, allowed for videos are width, height and frames, e.g. 832x480x81")
    return VideoSize(*map(int, found.groups()))


def call_options(size: Size) -> dict[str, int]:
    """Return the options of `pipe(prompt, ...)` for a size.

    Empty for the model's own size.
    """
    if not size:
        return {}
    if isinstance(size, int):
        return {"height": size, "width": size}
    own = video_size(size)
    return {"height": own.height, "width": own.width, "num_frames": own.frames}


def from_text(size: str | None) -> Size | None:
    """Return a size that was written on the command line."""
    return int(size) if size is not None and size.isascii() and size.isdigit() else size


def sound_size(size: Size) -> bool:
    """Return whether a size is one that cards may have."""
    try:
        return size >= 0 if isinstance(size, int) else video_size(size).frames > 0
    except ValueError:
        return False
