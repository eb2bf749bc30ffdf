"""Weights that turn the pull of the reverse KL into another f-divergence's.

For `D_f = E_q f(p / q)` of a student q and a target p, the gradient on the student's sample is the reverse KL's times
`h(r) = f''(r) r^2` at the ratio `r = p / q`, which a discriminator knows: trained by the logistic loss its logit is
`log r`.

Source: f-distill, arXiv 2502.15681, eq. 6 and tab. 1.
"""

from collections.abc import Callable

from torch import Tensor

RatioWeight = Callable[[Tensor], Tensor]  # r [B] -> h(r) [B]
LARGEST = 10.0  # ratios are clipped to 1/10 .. 10

RATIO_WEIGHTS: dict[str, RatioWeight] = {
    "kl": lambda r: r,  # f = r log r: covers all of the target
    "jeffreys": lambda r: 1 + r,  # f = (r - 1) log r
    "hellinger": lambda r: r.sqrt() / 2,  # f = (1 - sqrt r)^2
    "js": lambda r: r / (1 + r),  # f = r log r - (r + 1) log((r + 1) / 2)
    "softened-reverse-kl": lambda r: 1 / (1 + r),  # f = (r + 1) log((r + 1) / (2 r))
}


def ratio_weight(h: RatioWeight, logits: Tensor) -> Tensor:
    """Return the weight of each sample, whose mean is 1.

    `h(r) / mean h(r)` with `r = exp(mean logit)`, clipped. logits [B, N] are positive where the discriminator takes a
    sample for one of the target; returns [B], without gradient.
    """
    weight = h(logits.detach().float().mean(1).exp().clamp(1 / LARGEST, LARGEST))
    return weight / weight.mean()
