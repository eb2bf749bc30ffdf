"""Reading safetensors files that somebody else may have made: regular files alone, whole, and every number finite."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .reading import reason


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises ValueError with one line, without a cure, where it is missing, no regular file, damaged, or holds NaN or infinity."""
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file" if path.exists() else f"{path.name} is missing")
    try:
        tensors = load_file(path)
    except Exception as error:  # as many types as there are kinds of damage
        raise ValueError(f"{path.name} is damaged: {reason(error)}") from error
    odd = [n for n, t in tensors.items() if not finite(t)]
    if odd:
        raise ValueError(
            f"{path.name} has numbers in {odd[0]!r} that are not finite ({len(odd)} of {len(tensors)} tensors)"
        )
    return tensors


def require_floating(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same where all are real numbers. Raises ValueError with one line, without a cure, for whole numbers and truth values."""
    if odd := [n for n, t in tensors.items() if not t.is_floating_point()]:
        raise ValueError(
            f"{odd[0]!r} is {str(tensors[odd[0]].dtype).removeprefix('torch.')} ({len(odd)} of {len(tensors)} tensors), not real numbers"
        )
    return tensors


def finite(tensor: Tensor) -> bool:
    """Whether no number in it is NaN or infinite; whole numbers always are."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)  # NaN goes through to both
    return bool(low.isfinite()) and bool(high.isfinite())
