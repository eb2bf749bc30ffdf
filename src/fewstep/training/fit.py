"""Supervised fitting of one network to a loss.

This loop trains every teacher of the zoo.
"""

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .muon import Muon, is_matrix
from .state import latest_checkpoint, load_optimizer_tensors, optimizer_tensors, save_checkpoint


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit.

    The rate warms up, stays constant, and decays linearly to zero over the last `decay` steps; `ema` is the
    decay of the average of the weights. `optimizer: muon` trains the weight matrices with Muon and the rest
    with AdamW, at the same rate.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 200
    decay: int = 1000
    ema: float = 0.999
    weight_decay: float = 0.01
    clip: float = 1.0
    checkpoint_every: int = 500
    bf16: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"

    def lr_at(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = min(1.0, (self.steps - step) / max(1, self.decay))
        return self.lr * rise * fall


@dataclass(frozen=True)
class FitStep:
    """The result of one step."""

    step: int
    loss: float
    seconds: float


def fit(
    module: nn.Module, ema: nn.Module, loss_at: Callable[[int], Tensor], config: FitConfig, run: Path
) -> Generator[FitStep, None, None]:
    """Train `module` on `loss_at(step)`, and yield every step.

    `ema` holds the average of the weights. The fit resumes from `run` if checkpoints exist. `loss_at` must
    depend only on the step and the weights (see `state.seeded`), so that a resumed run equals the
    uninterrupted run bit for bit. Raises FloatingPointError at the first non-finite loss; the last checkpoint
    stays.
    """
    optimizers = _optimizers(module, config)
    start = 0
    if (found := latest_checkpoint(run)) is not None:
        groups, state = found
        module.load_state_dict(groups["module"])
        ema.load_state_dict(groups["ema"])
        for optimizer, names in optimizers:
            load_optimizer_tensors(optimizer, names, groups["optimizer"])
        start = state["step"]
    began = time.monotonic()
    for step in range(start, config.steps):
        for optimizer, _ in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step)
        loss = loss_at(step)
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(
                f"loss is {value} at step {step}; lower this fit's lr or set its bf16 to false, "
                "then run the same command again"
            )
        module.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), config.clip)
        for optimizer, _ in optimizers:
            optimizer.step()
        # The early average decays faster, so that the average never holds the initialisation.
        rate = min(config.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), 1 - rate)
        done = step + 1

        def save(done: int = done, value: float = value) -> None:
            moments = {k: v for optimizer, names in optimizers for k, v in optimizer_tensors(optimizer, names).items()}
            save_checkpoint(
                run,
                done,
                {"module": module.state_dict(), "ema": ema.state_dict(), "optimizer": moments},
                {"loss": value},
            )

        saved = done % config.checkpoint_every == 0 or done == config.steps
        if saved:
            save()
        try:
            yield FitStep(done, value, time.monotonic() - began)
        except GeneratorExit:  # the caller stops: save the last step
            if not saved:
                save()
            raise


def _optimizers(module: nn.Module, config: FitConfig) -> list[tuple[torch.optim.Optimizer, list[str]]]:
    """Return each optimizer with the names of the optimizer's parameters.

    Together the optimizers hold every parameter once.
    """
    named = dict(module.named_parameters())
    muon = [n for n, p in named.items() if config.optimizer == "muon" and is_matrix(module, n, p)]
    rest = [n for n in named if n not in set(muon)]
    decay = config.weight_decay
    adamw = torch.optim.AdamW([named[n] for n in rest], lr=config.lr, betas=(0.9, 0.99), weight_decay=decay, fused=True)
    optimizers: list[tuple[torch.optim.Optimizer, list[str]]] = [(adamw, rest)]
    if muon:
        optimizers.append((Muon([named[n] for n in muon], lr=config.lr, weight_decay=decay), muon))
    return optimizers
