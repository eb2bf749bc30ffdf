"""Motion of videos, and agreement of two sets of motions."""

import torch
from torch import Tensor


def motion(videos: Tensor) -> Tensor:
    """Return the mean change between frames of videos.

    `mean |x_{f+1} - x_f|` of videos [..., F, 3, H, W] in [0, 1], over frames, channels and pixels, in grey
    levels of 255; returns [...]. A still image has no motion. A cut or noise has much motion: look at the
    frames as well.
    """
    return 255 * videos.diff(dim=-4).abs().mean((-4, -3, -2, -1))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation.

    1 where both orders agree, 0 where the orders are unrelated; a, b [N], without ties.
    """
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
