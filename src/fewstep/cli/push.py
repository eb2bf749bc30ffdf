"""`fewstep push`: a student to the Hugging Face hub."""

from pathlib import Path

from ..backbones.load import quiet
from ..report.words import plural, size
from ..runs.push import Pushed, to_push
from ..student.hub import require_token, upload, without_bars
from .progress import console, put_result, working


def run_push(source: str, name: str, public: bool, dry: bool, base: str | None, licence: str | None) -> None:
    """Upload a student in one commit, or print what would be uploaded."""
    quiet()
    if not dry:
        require_token()
    with without_bars(), working("reading the student"):
        pushed = to_push(source, name, base, licence, public, dry)
    for note in pushed.notes:
        console.print(f"note: {note}", markup=False)
    files = {place: bytes_of(file) for place, file in pushed.files.items()}
    about = {"name": name, "public": public, "files": files, "left_out": pushed.left_out, "notes": pushed.notes}
    if dry:
        show(pushed, public)
        put_result({**about, "card": pushed.card})
        return
    console.print(f"uploading {said_files(pushed)} to {name}", markup=False)
    address = sent(pushed, public)
    console.print(address, markup=False)
    put_result({**about, "address": address})


def sent(pushed: Pushed, public: bool) -> str:
    """Upload, and return the address.

    On a terminal the hub's client shows bars of its own; in a log there are lines.
    """
    said = "Upload a student of fewstep"
    if console.live and console.shows_progress:
        return upload(pushed.name, pushed.files, public, said)
    with without_bars(), working(f"uploading to {pushed.name}"):
        return upload(pushed.name, pushed.files, public, said)


def said_files(pushed: Pushed) -> str:
    """Return how many files there are, and their size together."""
    return f"{plural(len(pushed.files), 'file')}, {size(sum(map(bytes_of, pushed.files.values())))}"


def bytes_of(file: Path | bytes) -> int:
    """Return the size of a file, or of a content."""
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def show(pushed: Pushed, public: bool) -> None:
    """Print files with sizes, what is left out, and the card."""
    console.print(f"{pushed.name} ({'public' if public else 'private'}): {said_files(pushed)}; nothing is sent")
    for place, file in sorted(pushed.files.items()):
        console.print(f"{size(bytes_of(file)):>12}  {place}", markup=False)
    for place in pushed.left_out:
        console.print(f"{'left out':>12}  {place}", markup=False)
    console.print(f"\n{pushed.card}", markup=False)
