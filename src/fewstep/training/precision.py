"""The precision in which a run's networks compute, and what a GPU does faster in it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from peft.tuners.lora import LoraLayer

from ..roles.adapters import keep_input_dtype

Precision = Literal["no", "bf16"]


@contextmanager
def computing(
    precision: Precision, device: torch.device, layers: Sequence[LoraLayer] = (), keep_casts: bool = True
) -> Iterator[None]:
    """Compute networks in a run's precision within the block.

    `layers` are those that carry adapters. In bf16, weights in single precision are cast at their use; casts of
    trained weights are kept until the block ends, unless `keep_casts` is false.
    """
    mixed = precision == "bf16"
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=keep_casts),
        keep_input_dtype(layers if mixed else ()),
        _fast_kernels(device, mixed),
    ):
        yield


@contextmanager
def _fast_kernels(device: torch.device, mixed: bool) -> Iterator[None]:
    """Let a GPU try which convolutions are fastest, and in bf16 multiply the rest of single precision as TF32.

    TF32 holds every number of bf16. On a CPU nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    tried, matrices = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = True
    if mixed:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tried
        torch.set_float32_matmul_precision(matrices)
