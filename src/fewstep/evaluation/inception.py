"""FID and KID in Inception's features.

Images enter the network of 2015-12-05 as `(RGB_255 - 128) / 128`. They are resized as clean-fid does, by PIL's bicubic
filter channel by channel, without rounding (Parmar et al., arXiv:2104.11222), or as torch-fidelity does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..hashes import sha256_of
from ..reading import reading
from .distances import Moments
from .weights import place

FILE = Path("inception", "inception-2015-12-05.pt")
URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
SIZE, BATCH = 299, 16


class FeatureNetwork(Protocol):
    """A function from inputs [B, 3, 299, 299] to features [B, D]."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Inception:
    """Inception's features, of images in [0, 1]."""

    network: FeatureNetwork
    resize: Callable[[Tensor], Tensor]
    weights: Mapping[str, str] = field(default_factory=dict)

    def features(self, images: Tensor) -> Tensor:
        """Return the features [N, D] of images [N, 3, H, W]."""
        with torch.inference_mode():
            parts = [self.network((self.resize(part) - 128) / 128).flatten(1) for part in images.split(BATCH)]
        return torch.cat(parts).float().cpu()


def clean_resize(images: Tensor, size: int = SIZE) -> Tensor:
    """Resize images for Inception, without rounding.

    images [N, 3, H, W] in [0, 1] become [N, 3, size, size] in [0, 255].
    """
    values = (images.detach().cpu().float().clamp(0, 1) * 255).round().numpy()
    channels = [
        np.asarray(Image.fromarray(channel, "F").resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255)
        for image in values
        for channel in image
    ]
    return torch.from_numpy(np.stack(channels)).unflatten(0, (len(images), 3))


def torch_resize(images: Tensor, size: int = SIZE) -> Tensor:
    """Resize images as TensorFlow 1 did, and torch-fidelity and torchmetrics do.

    Output pixel i is interpolated at `i in / out`, without antialiasing. images [N, 3, H, W] in [0, 1] become
    [N, 3, size, size] in [0, 255].
    """
    x = (images.detach().cpu().float().clamp(0, 1) * 255).round()
    for dim in (2, 3):
        place = torch.arange(size, dtype=torch.float32) * (x.shape[dim] / size)
        low = place.floor().long()
        part = (place - low).view(-1, *[1] * (3 - dim))
        x = x.index_select(dim, low).lerp(x.index_select(dim, (low + 1).clamp(max=x.shape[dim] - 1)), part)
    return x


def load_inception(metric: str) -> Inception:
    """Load the network that FID is defined by.

    It resizes images as the metric says. Raises ValueError in one line where the file is not there.
    """
    file = place() / FILE
    if not file.is_file():
        raise ValueError(
            f"--metrics {metric}: its network is not here; put {URL} into {file.parent}, "
            "or run: fewstep evaluate --install inception"
        )
    with reading(f"weights {file}:", "fetch it again"):
        network = torch.jit.load(str(file), map_location="cpu").eval()
    resize = torch_resize if metric == "fid_torch" else clean_resize
    return Inception(network.layers, resize, {FILE.as_posix(): sha256_of(file)})


def read_statistics(file: Path) -> Moments:
    """Read reference statistics: an npz with `mu` [D] and `sigma` [D, D].

    Raises ReadError where it is another file.
    """
    with reading(f"reference {file}", "pass an npz with mu and sigma, as clean-fid and others write"):
        with np.load(file, allow_pickle=False) as held:
            mean, covariance = (torch.from_numpy(np.asarray(held[name], dtype=np.float64)) for name in ("mu", "sigma"))
        if covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"sigma is {list(covariance.shape)}, mu is {list(mean.shape)}")
        return Moments(mean, covariance)
