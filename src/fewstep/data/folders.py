"""Regular files of a folder, in a fixed order.

The folder may come from anyone: links that lead out of the folder, pipes and devices are refused.
"""

import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from .texts import printable

FOREIGN = "__MACOSX"  # macOS's archiver adds a shadow of every file under this name, with the same suffix


def hidden(name: str) -> bool:
    """Return whether a name marks a file as no data.

    Examples: `.cache`, `._a.png`, `__MACOSX`.
    """
    return name.startswith(".") or name == FOREIGN


def files_in(root: Path, suffixes: Collection[str], option: str) -> Iterator[tuple[str, Path]]:
    """Yield all files of a folder with one of these suffixes, sorted.

    Each item is (name relative to `root` with slashes, path). Suffixes are compared in lower case, subfolders
    are searched, hidden files are left out. Links are followed if they stay below `root`, or in the blobs of
    the hub's cache that contains `root`.

    Raises ValueError with one line for a link that leads out or nowhere, for pipes and devices, and for a
    folder that cannot be read.
    """
    try:
        whole = root.resolve(strict=True)
        allowed = [whole, *(p.parent.parent / "blobs" for p in [whole, *whole.parents] if p.parent.name == "snapshots")]
        yield from _below(root, "", frozenset({whole}), allowed, suffixes, option)
    except (OSError, RuntimeError) as error:  # loops of links are a RuntimeError up to Python 3.12
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(
            f"{option}: {printable(root)} cannot be read ({printable(reason)}); check what lies there"
        ) from error


def _below(
    folder: Path, prefix: str, above: frozenset[Path], allowed: list[Path], suffixes: Collection[str], option: str
) -> Iterator[tuple[str, Path]]:
    for path in sorted(p for p in folder.iterdir() if not hidden(p.name)):
        wanted, name = path.suffix.lower() in suffixes, prefix + path.name
        if path.is_symlink():
            real = path.resolve()
            if not any(real.is_relative_to(a) for a in allowed) and (wanted or real.is_dir()):
                raise ValueError(
                    f"{option}: {printable(path)} is a link that leads out of the folder, to {printable(real)}; "
                    "copy what is meant into it"
                )
            if wanted and not real.exists():
                raise ValueError(
                    f"{option}: {printable(path)} is a link to {printable(real)}, which is not there; remove it"
                )
        mode = path.stat().st_mode if path.exists() else 0
        if stat.S_ISDIR(mode):
            real = path.resolve()
            if real not in above:  # a link to a folder that contains the link would loop for ever
                yield from _below(path, f"{name}/", above | {real}, allowed, suffixes, option)
        elif wanted and not stat.S_ISREG(mode):
            raise ValueError(f"{option}: {printable(path)} is a pipe or a device, not a file; remove it")
        elif wanted:
            yield name, path
