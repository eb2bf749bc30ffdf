"""AdamW, and AdamW whose moments are 8-bit numbers with a scale for every 256 (Dettmers et al., arXiv 2110.02861; the package bitsandbytes)."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import nn

from ..roles.sharding import by_kind

OptimizerName = Literal["adamw", "adamw8bit"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
LEAST, BLOCK = 4096, 256  # parameters of fewer numbers keep moments in single precision; numbers that share a scale


def require(name: OptimizerName) -> None:
    """Raises ValueError with one line where its package is missing."""
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise ValueError(
            "train.optimizer: adamw8bit needs the package bitsandbytes; run: pip install 'fewstep[train8bit]', or set it to adamw"
        )


def make_optimizer(
    parameters: Sequence[nn.Parameter], name: OptimizerName, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """With all its state, as it is before the first step: a card that is too small says so at once. Raises ValueError as `require`."""
    require(name)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        eight = AdamW8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay, min_8bit_size=LEAST)
        for i, p in enumerate(parameters):
            eight.init_state(eight.param_groups[0], p, 0, i)
        return eight
    spread, plain = by_kind(list(parameters))
    # On a GPU the other kinds hold all weights' updates at once; on a CPU this one takes two fifths of their time.
    fused = parameters[0].is_cuda or (parameters[0].device.type == "cpu" and not spread)
    groups = [{"params": group} for group in (spread, plain) if group]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
    for p in parameters:
        step = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def state_bytes(parameters: Iterable[nn.Parameter], name: OptimizerName) -> int:
    """What an optimiser holds for these: two moments each."""
    if name == "adamw":
        return sum(2 * p.numel() * p.element_size() for p in parameters)
    scales = torch.float32.itemsize
    return sum(2 * (n * scales if n < LEAST else n + scales * -(-n // BLOCK)) for p in parameters for n in (p.numel(),))
