"""Writing files that are either whole or not there.

A file is written under a temporary name next to its own, then renamed.
"""

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .hashes import bytes_of, combined, tensors_hash
from .names import visible
from .reading import reason, require_regular

# safetensors' names
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SHA256 = "sha256"  # key in a header, for the hash of all tensors of the file
NO_HASH = "0" * 64  # holds the hash's place until all is written
ENDING = ".fewstep.tmp"
# Names of files that a killed process leaves.
LEFT = re.compile(rf"\..*{re.escape(ENDING)}|\..+\.\d+\.tmp|\.checkpoint-\d{{6,}}\.tmp", re.DOTALL)
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
    """Say what to do about a file that could not be written.

    The advice follows from the cause that the system gave.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (said := re.search(r"os error (\d+)", str(error))):  # safetensors puts the number in a text
        number = int(said[1])
    if number is None:
        number = next(
            (n for n in (errno.ENOSPC, errno.EACCES, errno.ENAMETOOLONG) if os.strerror(n) in str(error)), None
        )
    return next(
        (cure for cure, numbers in CURES.items() if number in numbers), "see to that, then run the same command again"
    )


class WriteError(OSError):
    """The error for a file that could not be written.

    The message says what to do. `__cause__` is the system's error.
    """


def unwritten(path: Path, error: Exception, more: str = "") -> WriteError:
    """Return the error for a file that could not be written.

    The message says which file, why, and what to do. For a WriteError, the system's cause alone is repeated.
    """
    cause = cause_of(error)
    return WriteError(f"cannot write {path}: {cause}; {cure_of(cause)}{more}")


def cause_of(error: Exception) -> Exception:
    """Return the system's error behind a WriteError.

    Any other error comes back unchanged.
    """
    return error.__cause__ if isinstance(error, WriteError) and isinstance(error.__cause__, Exception) else error


def temporary_beside(path: Path) -> Path:
    """Return a unique temporary name in the same folder.

    The name is short, whatever `path` is called.
    """
    return path.with_name(f".{os.getpid()}-{next(_count)}{ENDING}")


def require_replaceable(path: Path, option: str = "") -> Path:
    """Return `path` where a file may be written there.

    There must be nothing, or an ordinary file: folders, devices, pipes and symbolic links are not replaced.
    Raises OSError, or ValueError with the name of the `option` where one is given.
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
            f"{option}: got {name}, which is {kind}; only ordinary files are replaced: pass the name of one, "
            "or of a new one"
        )
    raise OSError(f"{name} is {kind}, and only ordinary files are replaced; move it away")


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk.

    Where the system can. Raises OSError where the disk has no room or fails.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # Windows opens no folders, and some network drives sync none. Other drives say only now that they are full.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise


def sync_all(folder: Path) -> None:
    """Flush a folder with everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name.

    A copy where the file system knows no hard links.
    """
    try:
        os.link(source, target)
    except (OSError, NotImplementedError):
        shutil.copyfile(source, target)


def open_to_others(folder: Path) -> None:
    """Give the files in a new folder the permissions of new files.

    safetensors makes some files that their owner alone reads.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # the folder's own mode without the right to enter
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):  # file systems without permissions
                path.chmod(mode)


def remove_left(folder: Path, below: bool = True) -> list[Path]:
    """Remove the half-written files that killed processes left.

    In `folder` and, with `below`, in all folders below. Returns what was removed. Nobody may be writing
    there.
    """
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
    """Yield a temporary name, which becomes `path` when the block ends.

    When the block fails, nothing is left of the file. Folders are made as needed. Several processes may write
    at once: each has its own name, and the last one stays. The file is on the disk before it gets its name,
    and its permissions are those of any new file. Raises OSError that says what to do, with nothing changed,
    also where something else than a file has the name.
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
        if isinstance(error, OSError) and error.errno is None:  # fewstep's own, which says what to do
            raise
        raise unwritten(path, error) from error
    finally:
        with suppress(OSError):  # a file that could not be written often cannot be removed; the next run removes it
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> Path:
    """Write bytes and return `path`.

    Raises OSError with nothing changed.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write text in UTF-8 and return `path`.

    Raises OSError with nothing changed.
    """
    return write_bytes(path, utf8(text))


def append_text(path: Path, text: str) -> None:
    """Add text in UTF-8 to the end of a file.

    Raises OSError that says what to do. Then a part of the text may be in the file.
    """
    try:
        with path.open("ab") as file:
            file.write(utf8(text))
    except OSError as error:
        raise unwritten(path, error) from error


def utf8(text: str) -> bytes:
    """Encode text in UTF-8.

    A name that was read in a locale without its letters becomes the bytes that it has on the disk.
    """
    return text.encode("utf-8", "surrogateescape" if _restored(text) else "backslashreplace")


def _restored(text: str) -> bool:
    try:
        text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, in UTF-8.

    Raises OSError with nothing changed.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Escaped, bytes that are no UTF-8 are read back as they were.
    plain = text if _restored(text) else json.dumps(value, indent=2) + "\n"
    write_bytes(path, utf8(plain))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write tensors to one safetensors file, one after the other.

    The header has `about` and the tensors' hash. Raises OSError that says what to do, with nothing changed.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        stream_tensors(file, shapes_of(tensors), tensors.items(), about or {})


Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # of tensors, by name


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the dtypes and shapes of tensors."""
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def header_of(shapes: Shapes, about: Mapping[str, str] | None) -> tuple[bytes, dict[str, int], int]:
    """Return a safetensors header, each tensor's place, and the file's size.

    With `about`, the header has `about` and room for the hash of all tensors. Wide types come first, so that
    every tensor begins at a multiple of its own width.
    """
    header: dict[str, Any] = {} if about is None else {"__metadata__": {**dict(sorted(about.items())), SHA256: NO_HASH}}
    begins, end = dict[str, int](), 0
    for name in sorted(shapes, key=lambda n: (-shapes[n][0].itemsize, n)):
        (dtype, shape), begins[name] = shapes[name], end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return text, {name: 8 + len(text) + begin for name, begin in begins.items()}, 8 + len(text) + end


def stream_tensors(
    file: BinaryIO, shapes: Shapes, rows: Iterable[tuple[str, Tensor]], about: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file, and return the hash of its tensors.

    `rows` are (name, tensor), the rows of each tensor in their order; tensors may take turns. One of them is
    held at a time: it moves to the CPU, where it is hashed while it is written. The header has `about` and
    the hash; with None it has neither. Raises ValueError where the rows do not make up the `shapes`.
    """
    text, at, _ = header_of(shapes, about)
    hashes, wanted = {name: hashlib.sha256() for name in shapes}, dict(at)
    file.write(len(text).to_bytes(8, "little") + text)
    with ThreadPoolExecutor(1) as beside:
        for name, tensor in rows:
            content = bytes_of(tensor)
            hashed = beside.submit(hashes[name].update, content)
            file.seek(at[name])
            at[name] += file.write(content)
            hashed.result()
            del tensor, content, hashed  # before the next one comes
    for name, (dtype, shape) in shapes.items():
        if at[name] != wanted[name] + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{file.name}: the rows of {name} are not {shape[0]}")
    digest = combined((n, str(dtype), shape, hashes[n].hexdigest()) for n, (dtype, shape) in shapes.items())
    if about is not None:
        file.seek(8)
        file.write(text.replace(NO_HASH.encode(), digest.encode(), 1))
    return digest


def read_hashed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read (tensors, header) of a file of `write_tensors` or `write_rows`.

    Tensors are mapped into memory and read as they are used. Raises SafetensorError where the file is
    damaged: cut off, or with tensors that do not have the hash in the header.
    """
    try:
        with safe_open(require_regular(path), "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.offset_keys()}
    except (OSError, SafetensorError):
        raise
    except Exception as error:  # each kind of damage raises another type
        raise SafetensorError(reason(error)) from error
    if SHA256 in about and about[SHA256] != tensors_hash(tensors):
        raise SafetensorError("its tensors do not have the SHA-256 that its header says")
    return tensors, about


def require_room(path: Path, size: int) -> None:
    """Check that a file of `size` bytes has room at `path`.

    Raises OSError otherwise, before hours have gone into the file.
    """
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
    """Write tensors to one safetensors file, in parts.

    `parts` yields rows of tensors [count, ...], of which two parts at most are held. `whole` has tensors that
    are written at once. The size is known from the first part: before anything is written,
    `planned(path, size)` is called and room is looked for. Reading the file takes no memory either until rows
    are read. Raises ValueError where the parts do not add up to `count` rows, and OSError that says what to
    do, with nothing changed.
    """
    rest = iter(parts)
    first = next(rest)
    shapes = {
        **{name: (dtype, (count, *shape[1:])) for name, (dtype, shape) in shapes_of(first).items()},
        **shapes_of(whole),
    }
    size = header_of(shapes, {})[2]
    planned(path, size)
    require_room(path, size)
    with replacing(path) as temporary, temporary.open("wb") as file:
        stream_tensors(file, shapes, (item for part in chain([first], rest, [whole]) for item in part.items()), {})


ENTRY = 200  # bytes of a tensor's row in a header at most, its name included
ALIGNED = 8  # every tensor begins at a multiple of it, in bytes


def growing_header(count: int) -> int:
    """Return the bytes before the tensors in a file of `write_growing`."""
    return 8 + ENTRY * (2 * count + 2)  # a filler for each tensor, too


def write_growing(path: Path, tensors: Iterable[tuple[str, Tensor]], count: int) -> None:
    """Write at most `count` tensors to one safetensors file as they come.

    One tensor is held at a time; sizes need not be known before. The header has the tensors' hash. Raises
    OSError that says what to do, with nothing changed.
    """
    room = growing_header(count) - 8
    header, digests, end = dict[str, Any](), list[tuple[str, str, Iterable[int], str]](), 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.seek(8 + room)
        for name, tensor in _aligned(tensors):
            content = bytes_of(tensor)
            digests.append((name, str(tensor.dtype), tensor.shape, hashlib.sha256(content).hexdigest()))
            header[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + file.write(content)],
            }
            end += len(content)
        header["__metadata__"] = {SHA256: combined(digests)}
        file.seek(0)
        file.write(room.to_bytes(8, "little") + json.dumps(header, separators=(",", ":")).encode().ljust(room))


def _aligned(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors with fillers between them: the format has no gaps."""
    end = 0
    for name, tensor in tensors:
        if gap := -end % ALIGNED:
            yield f"filler.{end}", torch.zeros(gap, dtype=torch.uint8)
        end += gap + tensor.nbytes
        yield name, tensor
