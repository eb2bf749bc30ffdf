"""Transfers between the CPU and another device, for which nobody waits in vain.

A device computes behind the CPU, which goes on at once. Two things end that: a number of the device that the CPU asks
for, and a copy from ordinary memory; the CPU then waits for all that the device has to do before. So numbers are asked
for together, and copies come from pinned memory.
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor of the CPU to a device, without waiting."""
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def all_sent(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Send several tensors of the CPU to a device, without waiting."""
    return {name: sent(tensor, device) for name, tensor in tensors.items()}


def fetched(values: Sequence[Tensor]) -> list[float]:
    """Fetch numbers of one device to the CPU, in one transfer.

    Each tensor holds one number.
    """
    return [float(v) for v in together(values).cpu()] if values else []


def together(values: Sequence[Tensor]) -> Tensor:
    """Return numbers of one device as one tensor, in the widest of their types.

    Each tensor holds one number.
    """
    kind = reduce(torch.promote_types, (v.dtype for v in values))
    return torch.stack([v.detach().to(kind).reshape(()) for v in values])
