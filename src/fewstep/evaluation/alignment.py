"""Match of images to prompts, and diversity across seeds."""

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 5
COLLAPSED = 0.5  # share of the teacher's diversity


def name_ranks(queries: Tensor, gallery: Tensor, labels: Tensor, own: Tensor) -> Tensor:
    """Return the rank of each query's own label.

    The rank is the number of other labels that are nearer to the query: 0 means that the nearest image is
    right. Nearness is the cosine to the label's nearest image. queries [B, K], gallery [N, K] with labels [N]
    in 0..L-1, own [B]; returns [B], int64.
    """
    cosine = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    nearest = cosine.new_full((len(queries), int(labels.max()) + 1), -2.0)
    nearest.scatter_reduce_(1, labels.expand(len(queries), -1), cosine, "amax")
    return (nearest > nearest.gather(1, own[:, None])).sum(1)


def top(ranks: Tensor, k: int) -> float:
    """Return the share of ranks below k."""
    return float((ranks < k).double().mean())


def colour_histogram(images: Tensor) -> Tensor:
    """Return colour histograms on a 5 x 5 x 5 grid.

    Each pixel of images [B, 3, H, W] in [0, 1] is split between the 8 nearest points of the grid; returns
    shares [B, 125]. The histogram ignores positions: a figure may be moved or mirrored.
    """
    grid = torch.arange(BINS, device=images.device)
    r, g, b = (
        (1 - (images.flatten(2)[..., None] * (BINS - 1) - grid).abs()).clamp(min=0).unbind(1)
    )  # each [B, H W, BINS]
    return torch.einsum("npr,npg,npb->nrgb", r, g, b).flatten(1) / r.shape[1]


def nearest_colours(histograms: Tensor, candidates: Tensor) -> Tensor:
    """Return the index of the candidate with the nearest colours.

    Distance is total variation. histograms [B, 125], candidates [B, C, 125]; returns [B].
    """
    return (histograms[:, None] - candidates).abs().sum(2).argmin(1)


def diversity(x: Tensor) -> Tensor:
    """Return the mean distance between the images of one prompt.

    x [P, S, K]: S >= 2 seeds of each prompt; returns [P].
    """
    pairs = x.shape[1] * (x.shape[1] - 1)
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2)) / pairs
