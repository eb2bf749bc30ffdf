"""Archives that tests make: npm packages (.tgz) and webdataset shards (.tar)."""

import io
import tarfile
from pathlib import Path


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """Write `files` as one archive."""
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
