"""Files that a reader never sees half-written."""

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> Path:
    """Write `data` under a temporary name beside `path`, then rename; folders are made as needed. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
