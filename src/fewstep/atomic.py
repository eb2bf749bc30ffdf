"""Files that are either whole or not there: written under a temporary name beside their own, then renamed."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.bool: "BOOL"}  # safetensors' names


def sha256_of(*files: Path) -> str:
    """Of their contents, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it becomes `path` when the block ends, and nothing is left of it when the block fails.

    Folders are made as needed. Several processes may do it at once: each has its own name, the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> Path:
    """Returns `path`. Raises OSError with nothing changed."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


def write_json(path: Path, value: Any) -> None:
    """Indented, in UTF-8. Raises OSError with nothing changed."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, cure: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError that names the file and the `cure`; FileNotFoundError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {cure}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (it holds a {type(value).__name__}, not an object); {cure}")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """One safetensors file, `about` in its header. Raises OSError that says what to do, with nothing changed."""
    try:
        with replacing(path) as temporary:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, about)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}; free some space, then run the same command again") from error


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
    shapes = {k: (v.dtype, (count, *v.shape[1:])) for k, v in first.items()} | {k: (v.dtype, tuple(v.shape)) for k, v in whole.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    at = {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}
    planned(path, 8 + len(text) + end)
    require_room(path, 8 + len(text) + end)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for part in chain([first], rest, [whole]):
                for name, rows in part.items():
                    file.seek(at[name])
                    at[name] += file.write(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            if ends := [n for n, entry in header.items() if at[n] != 8 + len(text) + entry["data_offsets"][1]]:
                raise ValueError(f"{path}: the rows of {ends[0]} are not {count}")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}; free some space, then run the same command again") from error
