"""LPIPS, a distance of images as people see it.

`sum_l mean_hw sum_c w_lc (f_lhwc(a) - f_lhwc(b))^2`: AlexNet's features f after each of five convolutions, of length 1
at every place, with trained weights w (Zhang et al., arXiv:1801.03924, eq. 1; version 0.1 of the package `lpips`). The
seeds of a prompt are compared in it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hashes import sha256_of
from ..reading import reading
from ..tensors import read_tensors
from .scorer import PairDistance
from .weights import place

FILE = Path("lpips") / "alex.safetensors"  # in the folder of weights
SIDE = 64  # of the images that are compared, as of those that the weights w were trained on
SEEDS = 8  # images of a prompt whose pairs are compared
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of inputs in [-1, 1]
LAYERS = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")  # convolutions, as the package names them
STRIDES, PADDINGS, POOLED = (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (1, 2)


@dataclass(frozen=True)
class Lpips:
    """LPIPS of a network's weights, under the package's names."""

    tensors: Mapping[str, Tensor]
    key: str = "lpips"
    weights: Mapping[str, str] = field(default_factory=dict)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances [B] of two batches of images.

        a, b [B, 3, H, W] in [0, 1].
        """
        with torch.inference_mode():
            total = torch.zeros(len(a))
            for layer, (x, y) in enumerate(zip(self._features(a), self._features(b), strict=True)):
                heads = self.tensors[f"lin{layer}.model.1.weight"].view(1, -1, 1, 1)
                total += (heads * (x - y).square()).sum(1).mean((1, 2))
            return total

    def _features(self, images: Tensor) -> list[Tensor]:
        """Return the features of each layer.

        [B, C, H, W], of length 1 at every place.
        """
        shift, scale = (torch.tensor(v)[:, None, None] for v in (SHIFT, SCALE))
        x, found = (2 * images.float() - 1 - shift) / scale, []
        for i, name in enumerate(LAYERS):
            x = F.max_pool2d(x, 3, 2) if i in POOLED else x
            kernel, bias = (self.tensors[f"net.{name}.{kind}"] for kind in ("weight", "bias"))
            x = F.conv2d(x, kernel, bias, STRIDES[i], PADDINGS[i]).relu()
            found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found


def load_lpips() -> Lpips:
    """Load LPIPS with AlexNet.

    Raises ValueError in one line where its file is missing, damaged or of another network.
    """
    file = place() / FILE
    if not file.is_file():
        raise ValueError(
            f"--metrics lpips: its weights are not here; run: fewstep evaluate --install lpips, or put its {file.name} "
            f"into {file.parent}"
        )
    with reading(f"weights {file}:", "run: fewstep evaluate --install lpips"):
        tensors = {name: tensor.float() for name, tensor in read_tensors(file).items()}
        needed = [f"net.{name}.{kind}" for name in LAYERS for kind in ("weight", "bias")]
        lacking = sorted({*needed, *(f"lin{i}.model.1.weight" for i in range(len(LAYERS)))} - tensors.keys())
        if lacking:
            raise ValueError(f"it lacks {lacking[0]}")
    return Lpips(tensors, weights={str(FILE): sha256_of(file)})


def thumbnails(images: Tensor) -> Tensor:
    """Return small copies of images.

    [B, 3 * 64 * 64], of clips those of the middle frames.
    """
    stills = images if images.ndim == 4 else images[:, images.shape[1] // 2]
    small = F.interpolate(stills.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return small.clamp(0, 1).flatten(1)


def perceptual_diversity(measure: PairDistance, small: Tensor, groups: Sequence[Tensor] | Tensor) -> Tensor | None:
    """Return the mean distance between two images of each group, [G].

    `small` [N, 3 * 64 * 64] are thumbnails, and `groups` the indices of those of one prompt, of which `SEEDS` are
    compared. None where a group has a single image.
    """
    if min(map(len, groups), default=0) < 2:
        return None
    images = (small[rows[:SEEDS]].unflatten(1, (3, SIDE, SIDE)) for rows in groups)
    return torch.stack([_of_pairs(measure.distance, several) for several in images])


def _of_pairs(distance: Callable[[Tensor, Tensor], Tensor], images: Tensor) -> Tensor:
    first, second = torch.triu_indices(len(images), len(images), 1)
    return distance(images[first], images[second]).mean()
