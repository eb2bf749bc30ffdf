"""Files that are either whole or not there: written under a temporary name beside their own, then renamed."""

import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .hashes import bytes_of, combined, tensors_hash
from .names import visible
from .reading import reason, require_regular

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}  # safetensors' names
SHA256 = "sha256"  # in a header: of all tensors of the file
ENDING = ".fewstep.tmp"
LEFT = re.compile(
    rf"\..*{re.escape(ENDING)}|\..+\.\d+\.tmp|\.checkpoint-\d{{6,}}\.tmp", re.DOTALL
)  # names that a killed process leaves
CURES = {
    "free some space, then run the same command again": (errno.ENOSPC, errno.EDQUOT),
    "this folder may not be written to: choose another, or change its permissions": (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
    ),
    "its name is too long for this file system: choose a shorter one": (errno.ENAMETOOLONG,),
    "something else is in its place: move that away": (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST),
    "a part of its path is a file: choose another": (errno.ENOTDIR,),
}
_count = itertools.count()


def cure_of(error: Exception) -> str:
    """Say what to do about a file that could not be written, by the cause that the system gave."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (said := re.search(r"os error (\d+)", str(error))):  # safetensors says it in words
        number = int(said[1])
    if number is None:
        number = next(
            (n for n in (errno.ENOSPC, errno.EACCES, errno.ENAMETOOLONG) if os.strerror(n) in str(error)), None
        )
    return next(
        (cure for cure, numbers in CURES.items() if number in numbers), "see to that, then run the same command again"
    )


class WriteError(OSError):
    """What to say of a file that could not be written; its cause is what the system said."""


def unwritten(path: Path, error: Exception, more: str = "") -> WriteError:
    """Say which file could not be written, why, and what to do; of one inside it the cause alone."""
    cause = cause_of(error)
    return WriteError(f"cannot write {path}: {cause}; {cure_of(cause)}{more}")


def cause_of(error: Exception) -> Exception:
    """Return what the system said of a file that could not be written."""
    return error.__cause__ if isinstance(error, WriteError) and isinstance(error.__cause__, Exception) else error


def temporary_beside(path: Path) -> Path:
    """Return a name in the same folder that nobody else takes, short whatever `path` is called."""
    return path.with_name(f".{os.getpid()}-{next(_count)}{ENDING}")


def require_replaceable(path: Path, option: str = "") -> Path:
    """Return `path` where a file may be written there: nothing is, or an ordinary file.

    Raises OSError, or where an `option` is named ValueError with its name: folders, devices, pipes and symbolic links are not replaced.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return path
    if stat.S_ISREG(mode):
        return path
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    kind, name = kinds.get(stat.S_IFMT(mode), "a device"), visible(str(path), lines=False)
    if option:
        raise ValueError(
            f"{option}: got {name}, which is {kind}; only ordinary files are replaced: pass the name of one, or of a new one"
        )
    raise OSError(f"{name} is {kind}, and only ordinary files are replaced; move it away")


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk, where the system can. Raises OSError where the disk has no room for it, or fails."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:  # Windows opens no folders, some network drives sync none; others say at this time only that they are full
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise


def sync_all(folder: Path) -> None:
    """Bring a folder with everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; a copy where the file system knows no hard links."""
    try:
        os.link(source, target)
    except (OSError, NotImplementedError):
        shutil.copyfile(source, target)


def open_to_others(folder: Path) -> None:
    """Give the files in a new folder the permissions that new files have; safetensors makes some that their owner alone reads."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # what the folder was made with, but for the right to enter
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):  # file systems without permissions
                path.chmod(mode)


def remove_left(folder: Path, below: bool = True) -> list[Path]:
    """Remove what killed processes left of half-written files in `folder`, and `below` it; returns what it was. Nobody may be writing there."""
    found = [
        p
        for p in (folder.rglob(".*.tmp") if below else folder.glob(".*.tmp"))
        if LEFT.fullmatch(p.name) and not p.is_symlink()
    ]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return found


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it becomes `path` when the block ends, and nothing is left of it when the block fails.

    Folders are made as needed. Several processes may do it at once: each has its own name, the last one stays. The file is on the disk
    before it has its name, and its permissions are those of any new file. Raises OSError that says what to do, with nothing changed, also
    where something else than a file has that name.
    """
    require_replaceable(path)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as made:
            mode = stat.S_IMODE(os.fstat(made.fileno()).st_mode)
        yield temporary
        with suppress(OSError):  # file systems without permissions
            temporary.chmod(mode)  # safetensors makes files that their owner alone reads
        sync(temporary)
        require_replaceable(path)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # our own, which says all that
            raise
        raise unwritten(path, error) from error
    finally:
        with suppress(OSError):  # what could not be written often cannot be removed either; the next run does
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> Path:
    """Returns `path`. Raises OSError with nothing changed."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write text in UTF-8 and return `path`. Raises OSError with nothing changed."""
    return write_bytes(path, utf8(text))


def append_text(path: Path, text: str) -> None:
    """Add text in UTF-8 to the end of a file. Raises OSError that says what to do; a part of the text may be there then."""
    try:
        with path.open("ab") as file:
            file.write(utf8(text))
    except OSError as error:
        raise unwritten(path, error) from error


def utf8(text: str) -> bytes:
    """Encode text in UTF-8; a name that was read in a locale without its letters comes out as the bytes that it has on the disk."""
    return text.encode("utf-8", "surrogateescape" if _restored(text) else "backslashreplace")


def _restored(text: str) -> bool:
    try:
        text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Indented, in UTF-8. Raises OSError with nothing changed."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    plain = (
        text if _restored(text) else json.dumps(value, indent=2) + "\n"
    )  # bytes that are no UTF-8 come back as they were
    write_bytes(path, utf8(plain))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """One safetensors file, `about` and the tensors' hash in its header. Raises OSError that says what to do, with nothing changed."""
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, {**(about or {}), SHA256: tensors_hash(plain)})
        _sort_header(temporary)


def _sort_header(path: Path) -> None:
    """Put what a header says into the order of its keys: safetensors' own is another each time, and with it the hash of the file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, what the header says) of a file that `write_tensors` or `write_rows` wrote; the tensors are read as they are used.

    Raises SafetensorError where it is damaged: cut off, or its tensors are not those that the header has the hash of.
    """
    try:
        with safe_open(require_regular(path), "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.offset_keys()}
    except (OSError, SafetensorError):
        raise
    except Exception as error:  # as many types as there are kinds of damage
        raise SafetensorError(reason(error)) from error
    if SHA256 in about and about[SHA256] != tensors_hash(tensors):
        raise SafetensorError("its tensors do not have the SHA-256 that its header says")
    return tensors, about


def require_room(path: Path, size: int) -> None:
    """Raises OSError where a file of `size` bytes has no room at `path`, so that this is known before hours have gone into it."""
    there = next(p for p in path.absolute().parents if p.exists())
    if size > (free := shutil.disk_usage(there).free):
        raise OSError(
            f"cannot write {path}: it takes {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free there; "
            "free some space or choose another folder, then run the same command again"
        )


def write_rows(
    path: Path,
    count: int,
    parts: Iterable[Mapping[str, Tensor]],
    whole: Mapping[str, Tensor],
    planned: Callable[[Path, int], None] = lambda path, size: None,
) -> None:
    """One safetensors file of tensors [count, ...] whose rows come in `parts`, of which two at most are held, and of `whole` ones.

    Its size is known from the first part: `planned` hears it, and the room for it is looked for, before anything is written. Reading it
    again takes no memory either until rows are asked for. Raises ValueError where the parts do not add up, OSError that says what to do,
    with nothing changed.
    """
    rest = iter(parts)
    first = next(rest)
    shapes = {k: (v.dtype, (count, *v.shape[1:])) for k, v in first.items()} | {
        k: (v.dtype, tuple(v.shape)) for k, v in whole.items()
    }
    header: dict[str, Any] = {"__metadata__": {SHA256: "0" * 64}}  # as long as the hash that comes when all is written
    hashes = {name: hashlib.sha256() for name in shapes}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    at = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in shapes}
    planned(path, 8 + len(text) + end)
    require_room(path, 8 + len(text) + end)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in chain([first], rest, [whole]):
            for name, rows in part.items():
                file.seek(at[name])
                content = bytes_of(rows)
                hashes[name].update(content)
                at[name] += file.write(content)
        if ends := [n for n in shapes if at[n] != 8 + len(text) + header[n]["data_offsets"][1]]:
            raise ValueError(f"{path}: the rows of {ends[0]} are not {count}")
        whole_hash = combined((n, str(dtype), shape, hashes[n].hexdigest()) for n, (dtype, shape) in shapes.items())
        file.seek(8)
        file.write(text.replace(b"0" * 64, whole_hash.encode(), 1))
