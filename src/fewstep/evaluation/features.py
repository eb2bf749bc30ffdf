"""EfficientNet-lite0 features, the space in which images are compared.

The network is that of `tensorflow/tpu/models/official/efficientnet/lite` (Tan & Le, arXiv:1905.11946, without
squeeze-and-excitation and with ReLU6). The shipped weights have every batch normalisation folded into the
convolution before it; `zoo/features/README.md` says how they were made, and what was measured to choose the
size of the input.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tensors import finite, read_tensors

WEIGHTS = Path(__file__).parents[1] / "zoo" / "features" / "efficientnet_lite0.safetensors"
SIZE = 128
WIDTH = 1280
BATCH = 16  # larger batches exceed a CPU's cache: half the speed at 64
STAGES = (  # repeats, kernel, stride of the first block, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding.

    There are ceil(size / stride) outputs; the odd pixel of padding is on the right and below.
    """

    def forward(self, x: Tensor) -> Tensor:
        (k, _), (s, _) = self.kernel_size, self.stride
        height, width = (max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[2:])
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


class MBConv(nn.Module):
    """Inverted residual block.

    1x1 expansion, depthwise k x k, 1x1 projection; the input is added where the shapes agree.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = SameConv(channels, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, out, 1)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Network that returns features [B, 1280] of images.

    Images are [B, 3, H, W] in [0, 1], resized to `size` x `size` (bicubic, antialiased), and enter as
    `(RGB_255 - 127) / 128`. The features are the last ReLU6 averaged over space.
    """

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.size = size
        self.stem = SameConv(3, 32, 3, 2)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out in STAGES:
            for i in range(repeats):
                blocks.append(MBConv(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = SameConv(channels, WIDTH, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        x = (255 * x - 127) / 128
        x = self.blocks(F.relu6(self.stem(x)))
        return F.relu6(self.head(x)).mean((2, 3))


def feature_network() -> EfficientNetLite0:
    """Return the network with the shipped weights, float32, frozen."""
    network = EfficientNetLite0()
    network.load_state_dict({name: tensor.float() for name, tensor in read_tensors(WEIGHTS).items()})
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def features(network: nn.Module, images: Tensor) -> Tensor:
    """Return the features [N, 1280] of images.

    images [N, 3, H, W] in [0, 1]. Raises ValueError for images that are not finite.
    """
    if not finite(images):
        raise ValueError(
            "evaluate: the images to be measured are not finite; sample them in float32, or check what sampled them"
        )
    with torch.inference_mode():
        return torch.cat([network(batch) for batch in images.split(BATCH)])
