"""Time and memory of sampling."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Sampled = Tensor | tuple[Tensor, Tensor]  # images, or images with the states that they were decoded from
PROC = Path("/proc/self")


@dataclass(frozen=True)
class Timed:
    """One batch on the CPU, and what it cost.

    `seconds` are those of an image. `memory` is the largest memory in MiB while the batch was sampled: what torch
    had allocated on a CUDA device, otherwise the resident memory of the process; 0 where it cannot be told.
    """

    images: Tensor
    states: Tensor | None
    seconds: float
    memory: float


def timed(draw: Callable[[], Sampled]) -> Timed:
    """Sample one batch, and return it with its cost.

    Copying to the CPU waits for the device that samples.
    """
    known = _forget_peak()
    began = time.perf_counter()
    sampled = draw()
    images, states = (sampled, None) if isinstance(sampled, Tensor) else sampled
    images, states = images.cpu(), None if states is None else states.cpu()
    seconds = (time.perf_counter() - began) / len(images)
    return Timed(images, states, seconds, _peak() if known else 0.0)


def _forget_peak() -> bool:
    """Begin to measure the largest memory anew.

    Returns whether it can be measured here.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        (PROC / "clear_refs").write_text("5", encoding="ascii")  # Linux: the peak becomes what is resident now
    except OSError:
        return False
    return True


def _peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = (PROC / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)
