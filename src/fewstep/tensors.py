"""Reading safetensors files that somebody else may have made.

Files must be regular and whole, and every number finite.
"""

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .reading import reason


def read_tensors(path: Path, infinite: Collection[str] = ()) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises ValueError with one line, without a cure, where the file is missing, no regular file, damaged, or
    holds NaN or infinity.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file" if path.exists() else f"{path.name} is missing")
    try:
        tensors = load_file(path)
    except Exception as error:  # each kind of damage raises another type
        raise ValueError(f"{path.name} is damaged: {reason(error)}") from error
    odd = [n for n, t in tensors.items() if n not in infinite and not finite(t)]
    if odd:
        raise ValueError(
            f"{path.name} has numbers in {odd[0]!r} that are not finite ({len(odd)} of {len(tensors)} tensors)"
        )
    return tensors


def require_floating(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors if all hold real numbers.

    Raises ValueError with one line, without a cure, for whole numbers and truth values.
    """
    if odd := [n for n, t in tensors.items() if not t.is_floating_point()]:
        raise ValueError(
            f"{odd[0]!r} is {str(tensors[odd[0]].dtype).removeprefix('torch.')} ({len(odd)} of {len(tensors)} "
            "tensors), not real numbers"
        )
    return tensors


def finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds no NaN and no infinity.

    Whole numbers are always finite.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)  # a NaN makes both NaN
    return bool(low.isfinite()) and bool(high.isfinite())
