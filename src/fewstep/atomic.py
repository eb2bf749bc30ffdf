"""Files that are either whole or not there: written under a temporary name beside their own, then renamed."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


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
