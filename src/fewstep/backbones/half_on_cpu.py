"""How fast this CPU computes in half precision.

A CPU without instructions for bfloat16 or float16 computes in it ten to thirty times as slowly as in float32.
"""

import time

import torch
from torch import nn

SIDE, REPEATS = 192, 3  # of the matrices that are multiplied
SLOW = 3.0  # times as long as in float32; CPUs with instructions for it are faster than float32


def slowdown(dtype: torch.dtype) -> float:
    """Measure how many times as long as in float32 a product takes.

    Of the fastest of some products of two matrices on this CPU, a few milliseconds in all.
    """
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    a, found = torch.ones(SIDE, SIDE, dtype=dtype), []
    for _ in range(REPEATS + 1):  # the first one is not as fast
        began = time.perf_counter()
        torch.mm(a, a)
        found.append(time.perf_counter() - began)
    return max(min(found), 1e-9)


def half_types(module: nn.Module) -> list[torch.dtype]:
    """Return the half-precision types of a network's weights."""
    return sorted({p.dtype for p in module.parameters()} & {torch.float16, torch.bfloat16}, key=str)


def slow_half(dtype: torch.dtype, cure: str) -> str:
    """Say that this CPU is slow in a half precision.

    With what helps; empty where it is not slow.
    """
    name, times = str(dtype).removeprefix("torch."), slowdown(dtype)
    return f"this CPU computes {name} about {times:.0f} times as slowly as float32; {cure}" if times > SLOW else ""
