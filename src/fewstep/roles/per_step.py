"""Weights of its own for each step of a student.

Each sample goes to the weights of its step: to one of several adapters of one network, or to one of several networks.

Source: Z-Image Turbo++, arXiv 2606.12575; one expert for each phase: Phased DMD, arXiv 2510.27684.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..backbones.base import Cond
from ..backbones.base import rows as rows_of
from ..core.prediction import Split
from ..core.solvers import Denoise
from ..core.timegrid import segments_at

Rows = slice | Tensor
DenoiseOwn = Callable[[int, Cond], Denoise]  # step, conditions -> denoiser with the weights of the step


def step_name(role: str, step: int) -> str:
    """Return what a step's weights of a role are called.

    Steps count from 0. As adapters beside another are called: `student`, `student_2`, `student_3`.
    """
    return f"{role}_{step + 1}" if step else role


def by_step(own: DenoiseOwn, cond: Cond, times: Tensor, known: Tensor | None = None) -> Denoise:
    """Return a denoiser that calls the weights of each sample's step.

    A batch is split by step: one call for each step that it has, put together again in its order. Steps follow from the
    samples' times on the grid `times [K + 1]`, which a device has to be asked for; or they are `known`, [B] or [1] on
    the CPU.
    """

    def denoise(x: Tensor, t: Tensor) -> Split:
        step = _steps_at(times, t) if known is None else known
        served = torch.unique(step).tolist()
        if len(served) == 1:
            return own(served[0], cond)(x, t)
        parts = _parts(step, served, x.device)
        found = [own(k, rows_of(cond, r))(x[r], t[r]) for k, r in zip(served, parts, strict=True)]
        x0, eps = torch.cat([p.x0 for p in found]), torch.cat([p.eps for p in found])
        indices = [r for r in parts if isinstance(r, Tensor)]
        if not indices:
            return Split(x0, eps)
        back = torch.cat(indices).argsort()
        return Split(x0[back], eps[back])

    return denoise


def _steps_at(times: Tensor, t: Tensor) -> Tensor:
    """Return the step of each time, on the CPU.

    Times without numbers, of a memory plan, are the first step's.
    """
    return torch.zeros(1, dtype=torch.long) if isinstance(t, FakeTensor) else segments_at(times, t).cpu()


def _parts(step: Tensor, served: list[int], device: torch.device) -> list[Rows]:
    """Return the rows of each step.

    Training draws steps in ascending order, whose rows are slices: nothing is copied.
    """
    if bool((step.diff() >= 0).all()):
        ends = [int((step <= k).sum()) for k in served]
        return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    return [(step == k).nonzero()[:, 0].to(device) for k in served]
