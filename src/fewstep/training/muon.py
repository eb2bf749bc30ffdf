"""Muon: momentum with an orthogonalised update of each weight matrix.

Rare directions learn as fast as common directions. Sources: Jordan et al. 2024 (the update); Liu et al. 2025
(the scale 0.2 sqrt(max(rows, columns)), which makes AdamW's rates fit).

`torch.optim.Muon` takes plain matrices, one after the other. This implementation also takes convolutions, as
[out, in * kh * kw], and iterates all matrices of one shape in a batch.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return approximately `U V^T` for each `M = U S V^T`.

    Five quintic Newton-Schulz iterations; singular values end in [0.7, 1.2]. `matrices` [N, R, C] of any
    dtype -> [N, R, C] in bfloat16.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def is_matrix(module: nn.Module, name: str, parameter: nn.Parameter, least: int = 32) -> bool:
    """Return whether Muon should train this parameter.

    Muon trains the weights of linear and convolution layers with at least `least` rows and columns.
    Embeddings, norms and biases are not maps between features; a layer of a few rows has no spectrum to
    flatten.
    """
    if not name.endswith("weight") or not isinstance(
        module.get_submodule(name.rpartition(".")[0]), nn.Linear | nn.Conv2d | nn.Conv3d
    ):
        return False
    return min(len(parameter), parameter[0].numel()) >= least


class Muon(torch.optim.Optimizer):
    """Muon optimizer: orthogonalised Nesterov momentum, decoupled weight decay.

    State: one `momentum` per parameter.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, mu, keep = group["lr"], group["momentum"], 1 - group["lr"] * group["weight_decay"]
            shapes: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((len(p), p[0].numel()), []).append(p)
            for (rows, columns), same in shapes.items():
                gradients = [p.grad for p in same if p.grad is not None]
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in same]
                torch._foreach_lerp_(momenta, gradients, 1 - mu)
                ahead = torch._foreach_lerp(gradients, momenta, mu)
                update = orthogonalise(torch.stack([g.reshape(rows, columns) for g in ahead]))
                scale = 0.2 * max(rows, columns) ** 0.5
                torch._foreach_mul_(same, keep)
                torch._foreach_add_(
                    same, [u.reshape(p.shape).to(p.dtype) for u, p in zip(update, same, strict=True)], alpha=-lr * scale
                )
