"""What a notebook shows.

Bars with the time left, and images beside texts. IPython is used where a notebook has loaded it, and needed nowhere.
"""

import base64
import html
import io
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDEST = 1600  # pixels of an image in a notebook, which is stored in the notebook's file
EVERY = 0.5  # seconds between two pictures of a bar
BAR = (
    '<div style="max-width:40em;height:.6em;border-radius:.3em;background:#8884">'
    '<div style="width:{share:.1f}%;height:100%;border-radius:.3em;background:#4078c0"></div></div>'
)


def in_notebook() -> bool:
    """Return whether this is a notebook, whose cells show HTML."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    shell = get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def as_html(text: str, image: bytes | None = None) -> str:
    """Return a text, and a PNG image below, as HTML.

    Nothing in the text is read as markup.
    """
    shown = f"<div><code>{html.escape(text)}</code></div>"
    if image is None:
        return shown
    data = base64.b64encode(_narrow(image)).decode()
    return f'{shown}<img style="max-width:100%" alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def png_of(image: Path | bytes | None) -> bytes | None:
    """Return the bytes of a PNG, None where its file is gone."""
    if not isinstance(image, Path):
        return image
    try:
        return image.read_bytes() if image.is_file() else None
    except OSError:
        return None


def _narrow(image: bytes) -> bytes:
    """Return a PNG that is at most `WIDEST` pixels wide."""
    from PIL import Image  # a command line that shows no image does not wait for it

    with Image.open(io.BytesIO(image), formats=("PNG",)) as found:
        if found.width <= WIDEST:
            return image
        smaller = found.convert("RGB").resize((WIDEST, max(1, found.height * WIDEST // found.width)))
    buffer = io.BytesIO()
    smaller.save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Board:
    """One output of a cell.

    A bar with the time left, and the newest image. `show` changes them. An image stays until there is another one.
    """

    title: str
    total: int
    first: int = 0  # done before, at no cost of this cell
    began: float = field(default_factory=time.monotonic)
    drawn: float = 0.0
    image: Path | bytes | None = None
    handle: Any = None

    def show(self, done: int, note: str = "", left: float | None = None, image: Path | bytes | None = None) -> None:
        """Show that `done` of `total` are finished.

        `left` are the seconds left, by default those at the speed so far. Calls that follow each other too soon
        change nothing, but for the last one and for one with a new image.
        """
        now = time.monotonic()
        newer = image is not None and image is not self.image
        if now - self.drawn < EVERY and done < self.total and not newer:
            return
        from IPython.display import HTML, display

        self.drawn, self.image = now, image if newer else self.image
        page = HTML(self.html(done, now, note, left))
        if self.handle is None:
            self.handle = display(page, display_id=True)
        else:
            self.handle.update(page)

    def html(self, done: int, now: float, note: str = "", left: float | None = None) -> str:
        """Return what is shown."""
        if left is None:
            left = time_left(now - self.began, done - self.first, self.total - done)
        share = 100.0 * done / max(1, self.total)
        rest = "" if left is None else f", {clock(left)} left"
        text = f"{self.title}: {done:,} of {self.total:,}{rest}{note and f'  {note}'}"
        return BAR.format(share=min(share, 100.0)) + as_html(text, png_of(self.image))


def time_left(seconds: float, done: int, rest: int) -> float | None:
    """Return the seconds that the rest takes.

    At the speed of what was `done` in so many seconds; None where that is nothing.
    """
    return seconds / done * max(0, rest) if done > 0 else None


def clock(seconds: float) -> str:
    """Return `0:42`, or `2:03:07` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
