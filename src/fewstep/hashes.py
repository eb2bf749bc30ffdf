"""SHA-256 of files and of tensors.

A flipped bit is found where a file is read again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reading import object_in, reading

LISTING, FILES = "fewstep.json", "files"  # file and key with the hashes of a student's weight files
UNLISTED = ("-lora.safetensors", "-kohya.safetensors")  # copies for other programs, which fewstep never reads


def sha256_of(*files: Path) -> str:
    """Hash the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's content in memory, row by row.

    Without a copy where the tensor is contiguous on the CPU.
    """
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def hash_of(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's content."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def combined(parts: Iterable[tuple[str, str, Iterable[int], str]]) -> str:
    """Combine the hashes of tensors into one, in any order.

    Each part is (name, dtype, shape, hash of the content).
    """
    rows = sorted([name, dtype, list(shape), digest] for name, dtype, shape, digest in parts)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of named tensors.

    The hash is of names, dtypes, shapes and contents. Several tensors are read at once.
    """
    with ThreadPoolExecutor() as pool:
        digests = pool.map(hash_of, tensors.values())
        return combined(
            (name, str(t.dtype), t.shape, digest) for (name, t), digest in zip(tensors.items(), digests, strict=True)
        )


def values_hash(value: Any) -> str:
    """Return the hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def weight_hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every weight file in a student's folder.

    The keys are paths inside the folder.
    """
    files = [f for f in sorted(folder.rglob("*.safetensors")) if not f.name.endswith(UNLISTED)]
    return {f.relative_to(folder).as_posix(): sha256_of(f) for f in files}


def require_listed(folder: Path, *names: str) -> None:
    """Check files of a student's folder against the hashes in `fewstep.json`.

    `names` are files, or folders whose files are all checked. Files that `fewstep.json` does not list pass.
    Raises ValueError where a file has changed, and where a listed one is missing.
    """
    listing = folder / LISTING
    with reading(f"student: {listing}", "export the run again"):
        listed = object_in(listing).get(FILES, {}) if listing.is_file() else {}
        if not isinstance(listed, dict):
            raise ValueError(f"its {FILES} are a {type(listed).__name__}")
    for name, digest in listed.items():
        if not any(name == asked or name.startswith(f"{asked}/") for asked in names):
            continue
        if not (folder / name).is_file():
            raise ValueError(f"student: {folder / name} is missing; copy it again, or export the run again")
        if sha256_of(folder / name) != digest:
            raise ValueError(
                f"student: {folder / name} is damaged or was changed (another SHA-256 than in {LISTING}); "
                "copy it again, or export the run again"
            )
