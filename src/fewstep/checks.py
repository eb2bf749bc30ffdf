"""Conformance checks for whoever adds an objective: run one in your own tests and it is done when this is silent."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Inputs = Callable[[int, torch.Generator], tuple[Tensor, ...]]  # (batch, generator) -> the objective's arguments, batch first


def check_objective(objective: Callable[..., Tensor], inputs: Inputs, trained: Sequence[int], batch: int = 6) -> None:
    """Whether `objective` is a pure function of a batch to one loss per sample whose gradient goes where it should.

    `inputs(batch, generator)` draws arguments, each tensor [B, ...] float32; `trained` are the positions of those that carry a
    gradient, all others are constants to it. Raises ValueError that says what is wrong.
    """
    name = getattr(objective, "__name__", repr(objective))
    drawn = inputs(batch, torch.Generator().manual_seed(0))
    arguments = tuple(a.detach().clone().requires_grad_() for a in drawn)
    before = [a.detach().clone() for a in arguments]
    value = objective(*arguments)

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"objective {name}: {what}")

    require(value.shape == (batch,), f"returned {list(value.shape)}; return one loss per sample, [{batch}]")
    require(
        value.dtype == drawn[trained[0]].dtype, f"returned {value.dtype} for {drawn[trained[0]].dtype}; keep the dtype of what is trained"
    )
    require(bool(value.isfinite().all()), "is not finite on ordinary inputs")
    require(
        torch.equal(objective(*arguments).detach(), value.detach()), "gives another value the second time; take randomness as an argument"
    )
    require(all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True)), "changes its arguments")

    order = torch.arange(batch).flip(0)
    turned = objective(*(a[order] for a in arguments))
    require(torch.allclose(turned, value[order], rtol=1e-4, atol=1e-6), "depends on the order of the samples")
    alone = torch.cat([objective(*(a[i : i + 1] for a in arguments)) for i in range(batch)])
    require(torch.allclose(alone, value, rtol=1e-4, atol=1e-6), "mixes samples of a batch: normalise per sample")

    gradients = torch.autograd.grad(value.sum(), arguments, allow_unused=True)
    for i, gradient in enumerate(gradients):
        reached = gradient is not None and bool(gradient.any())
        require(i not in trained or reached, f"gives argument {i} no gradient")
        require(i in trained or not reached, f"gives argument {i} a gradient, which is a constant to it: detach it")
    reaching = [g for g in gradients if g is not None]
    require(all(bool(g.isfinite().all()) for g in reaching), "has a gradient that is not finite")

    for scale, when in ((0.0, "where everything is equal"), (1e4, "on inputs of size 10,000")):
        far = tuple((a.detach() * scale if a.ndim > 1 else a.detach()).requires_grad_() for a in arguments)
        loss = objective(*far)
        slopes = torch.autograd.grad(loss.sum(), [far[i] for i in trained], allow_unused=True)
        require(bool(loss.isfinite().all()), f"is not finite {when}")
        require(all(g is None or bool(g.isfinite().all()) for g in slopes), f"has a gradient that is not finite {when}")
