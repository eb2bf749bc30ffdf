"""Does a picture show what its prompt says, and do different seeds give different pictures?"""

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 5
COLLAPSED = 0.5  # of the teacher's diversity


def name_ranks(queries: Tensor, gallery: Tensor, labels: Tensor, own: Tensor) -> Tensor:
    """How many other labels are nearer to each query than its own: 0 means that the nearest picture is the right one. [B], int64.

    Nearness is the cosine, of a label's nearest picture. queries [B, K], gallery [N, K] with labels [N] in 0..L-1, own [B].
    """
    cosine = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    nearest = cosine.new_full((len(queries), int(labels.max()) + 1), -2.0)
    nearest.scatter_reduce_(1, labels.expand(len(queries), -1), cosine, "amax")
    return (nearest > nearest.gather(1, own[:, None])).sum(1)


def top(ranks: Tensor, k: int) -> float:
    """The share of ranks below k."""
    return float((ranks < k).double().mean())


def colour_histogram(images: Tensor) -> Tensor:
    """Shares of a 5 x 5 x 5 grid of colours, [B, 125]. Each pixel of images [B, 3, H, W] in [0, 1] is split between its 8 neighbours.

    It knows nothing of where a colour is: a figure may be moved or mirrored.
    """
    grid = torch.arange(BINS, device=images.device)
    r, g, b = (
        (1 - (images.flatten(2)[..., None] * (BINS - 1) - grid).abs()).clamp(min=0).unbind(1)
    )  # each [B, H W, BINS]
    return torch.einsum("npr,npg,npb->nrgb", r, g, b).flatten(1) / r.shape[1]


def nearest_colours(histograms: Tensor, candidates: Tensor) -> Tensor:
    """Which candidate has the most alike colours (total variation), [B]. histograms [B, 125], candidates [B, C, 125]."""
    return (histograms[:, None] - candidates).abs().sum(2).argmin(1)


def diversity(x: Tensor) -> Tensor:
    """Mean distance between the pictures of one prompt, [P]. x [P, S, K]: S >= 2 seeds of each prompt."""
    pairs = x.shape[1] * (x.shape[1] - 1)
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2)) / pairs
