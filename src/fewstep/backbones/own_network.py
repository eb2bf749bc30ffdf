"""Checks of a custom network before it is used.

A few calls say whether it is a function of states, times and conditions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core import timegrid
from .apart import apart
from .base import Backbone, Cond, rows
from .conditions import require_steady
from .modules import dtype_of
from .parts import DiffusersBackbone

PLACES = (0.5, 0.25)  # fractions of the way to noise
# Tolerance as a share of the largest number, by type.
CLOSE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


def require_network(backbone: Backbone, prompts: list[str]) -> None:
    """Check that a custom network does what its Denoiser says.

    A copy of its modules is called. Raises ValueError with one line.
    """
    if isinstance(backbone, DiffusersBackbone):
        return
    backbone = apart(backbone)
    require_steady(backbone.encode, prompts)
    with torch.no_grad():
        x, t, cond = question(backbone, prompts)
        m = _called(backbone, x, t, cond)
        again = torch.stack([_called(backbone, x, t, cond) for _ in range(2)])
        alone = [_called(backbone, x[i : i + 1], t[i : i + 1], rows(cond, slice(i, i + 1))) for i in range(len(x))]
    close, largest = CLOSE.get(dtype_of(backbone.module), 0.1), max(1.0, float(m.abs().max()))
    if not float((again - m).abs().max()) <= close * largest:
        raise ValueError(
            f"teacher: the network of {backbone.name} gives another answer to the same question the second time; "
            "take dropout and noise out of its forward (those of nn.Dropout are off in eval mode), "
            "and keep nothing between calls"
        )
    if not float((torch.cat(alone) - m).abs().max()) <= close * largest:
        raise ValueError(
            f"teacher: the network of {backbone.name} answers for a sample otherwise alone than in a batch; "
            "let each row depend on its own state, time and conditions"
        )


def question(backbone: Backbone, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Cond]:
    """Return (two states of noise, times, conditions).

    The conditions are those of the first prompt and of the empty one.
    """
    asked = [prompts[0], ""]
    device = next(backbone.module.parameters()).device
    cond = {k: v.to(device) for k, v in backbone.encode(asked).items()}
    x = torch.randn((len(asked), *backbone.shape), generator=torch.Generator().manual_seed(0)).to(device)
    t = timegrid.time_at(backbone.schedule, torch.tensor(PLACES, dtype=torch.float64)).to(device)
    return x, t, cond


def _called(backbone: Backbone, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Return the network's answer to copies of its inputs.

    Raises ValueError where it fails, changes its inputs, or does not answer with finite states.
    """
    own_x, own_cond = x.clone(), {k: v.clone() for k, v in cond.items()}
    heard = "".join(f", {k} {list(v.shape)}" for k, v in cond.items())
    about = f"teacher: the network of {backbone.name}"
    try:
        m = backbone.predict(backbone.module, own_x, t, own_cond)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a network of one's own may raise anything
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(
            f"{about} does not take states {list(x.shape)} with times [{len(x)}]{heard} ({said}); "
            f"check shape and conditions of the Denoiser{_of_times(backbone)}"
        ) from error
    if not isinstance(m, Tensor) or m.shape != x.shape:
        got = list(m.shape) if isinstance(m, Tensor) else type(m).__name__
        raise ValueError(f"{about} gives {got} for states {list(x.shape)}; check the Denoiser's shape")
    if not bool(m.isfinite().all()):
        raise ValueError(
            f"{about} gives numbers that are not finite in the middle of its trajectory; "
            "check its weights and its schedule"
        )
    if changed := _changed({"states": x, **cond}, {"states": own_x, **own_cond}):
        raise ValueError(
            f"{about} changes the {changed} that it is given, in place; "
            "let it work on a copy (x = x * 2, not x.mul_(2))"
        )
    return m


def _of_times(backbone: Backbone) -> str:
    """Say what half-precision networks are told times in; empty for others."""
    half = dtype_of(backbone.module).itemsize < 4
    return ", and that its times, which are float32, are cast where they meet weights" if half else ""


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """Return the first name whose tensor is another; empty for none."""
    return next((k for k, v in before.items() if not torch.equal(v.nan_to_num(), after[k].nan_to_num())), "")
