"""AdamW, in single precision or with 8-bit moments.

8-bit moments have one scale for every 256 numbers (Dettmers et al., arXiv 2110.02861; the package
bitsandbytes).
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..roles.sharding import by_kind

OptimizerName = Literal["adamw", "adamw8bit"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
# LEAST: numbers of the smallest parameter with 8-bit moments. BLOCK: numbers that share a scale.
LEAST, BLOCK = 4096, 256


def require(name: OptimizerName) -> None:
    """Check that the optimizer's package is installed.

    Raises ValueError with one line otherwise.
    """
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise ValueError(
            "train.optimizer: adamw8bit needs the package bitsandbytes; "
            "run: pip install 'fewstep[train8bit]', or set it to adamw"
        )


class AdamW(torch.optim.AdamW):
    """AdamW whose step the device itself can leave out, as torch's gradient scaler asks for it.

    Where `found_inf` (float32, one number, on the parameters' device) is 1, a fused step changes nothing.
    """

    found_inf: Tensor | None = None


def step_unless(failed: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take an optimizer's step, unless `failed` is 1.

    `failed` is float32, one number, on the parameters' device. Fused AdamW asks the device. For other optimizers,
    and weights sharded over processes, the CPU asks and waits.
    """
    groups = optimizer.param_groups
    if isinstance(optimizer, AdamW) and failed.device.type != "cpu" and groups[0]["fused"]:
        spread, _ = by_kind([p for group in groups for p in group["params"]])
        if not spread:
            optimizer.found_inf = failed
            optimizer.step()
            return
    if not bool(failed):
        optimizer.step()


def make_optimizer(
    parameters: Sequence[nn.Parameter], name: OptimizerName, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Return an optimizer with all state allocated.

    The state is that before the first step, so a GPU that is too small fails at once. Raises ValueError as
    `require`.
    """
    require(name)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        eight = AdamW8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay, min_8bit_size=LEAST)
        for i, p in enumerate(parameters):
            eight.init_state(eight.param_groups[0], p, 0, i)
        return eight
    spread, plain = by_kind(list(parameters))
    # Fused AdamW: on a GPU the other kinds hold all updates at once; on a CPU they take 2.5 times as long.
    fused = parameters[0].device.type != "cpu" or not spread
    groups = [{"params": group} for group in (spread, plain) if group]
    optimizer = AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
    for p in parameters:
        step = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def state_bytes(parameters: Iterable[nn.Parameter], name: OptimizerName) -> int:
    """Return the bytes of an optimizer's state, two moments per number."""
    if name == "adamw":
        return sum(2 * p.numel() * p.element_size() for p in parameters)
    scales = torch.float32.itemsize
    return sum(2 * (n * scales if n < LEAST else n + scales * -(-n // BLOCK)) for p in parameters for n in (p.numel(),))
