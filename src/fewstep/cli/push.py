"""`fewstep push`: a student to the Hugging Face hub."""

from pathlib import Path

from ..backbones.load import quiet
from ..report.words import plural, size
from ..runs.push import Pushed, to_push
from ..student.hub import require_token, upload
from .progress import console


def run_push(source: str, name: str, public: bool, dry: bool, base: str | None, licence: str | None) -> None:
    """Upload a student in one commit, or print what would be uploaded."""
    quiet()
    if not dry:
        require_token()
    pushed = to_push(source, name, base, licence, public, dry)
    for note in pushed.notes:
        console.print(f"note: {note}", markup=False)
    if dry:
        show(pushed, public)
        return
    console.print(f"uploading {said_files(pushed)} to {name}", markup=False)
    console.print(upload(name, pushed.files, public, "Upload a student of fewstep"), markup=False)


def said_files(pushed: Pushed) -> str:
    """Return how many files there are, and their size together."""
    return f"{plural(len(pushed.files), 'file')}, {size(sum(map(bytes_of, pushed.files.values())))}"


def bytes_of(file: Path | bytes) -> int:
    """Return the size of a file, or of a content."""
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def show(pushed: Pushed, public: bool) -> None:
    """Print the files with their sizes, what is left out, and the card."""
    console.print(f"{pushed.name} ({'public' if public else 'private'}): {said_files(pushed)}; nothing is sent")
    for place, file in sorted(pushed.files.items()):
        console.print(f"{size(bytes_of(file)):>12}  {place}", markup=False)
    for place in pushed.left_out:
        console.print(f"{'left out':>12}  {place}", markup=False)
    console.print(f"\n{pushed.card}", markup=False)
