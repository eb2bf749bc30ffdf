"""How much videos move, and whether two sets of them move alike."""

import torch
from torch import Tensor


def motion(videos: Tensor) -> Tensor:
    """`mean |x_{f+1} - x_f|` of videos [..., F, 3, H, W] in [0, 1]: over frames, channels and pixels, in grey levels of 255, [...].

    A still has none. A cut or noise has much: look at the frames as well.
    """
    return 255 * videos.diff(dim=-4).abs().mean((-4, -3, -2, -1))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: 1 where both put the same things in the same order, 0 where they have nothing to do with each other; a, b [N], no ties."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
