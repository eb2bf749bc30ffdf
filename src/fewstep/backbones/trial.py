"""A trial call of every part of a teacher.

Parts that do not go together are found before anything is built on them.
"""

import math
from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..reading import reason
from .base import Backbone
from .parts import Latent, Sized, WithUNet
from .weights import UnfitError

SMALL = 2**12  # largest state, in numbers, for which a call on a CPU takes no time
LARGE = 3 * 10**9  # weights of a network that is not called on a CPU


def require_runs(backbone: Backbone) -> None:
    """Check that encoding, predicting and decoding run.

    The states are as small as the network takes them. For large states or networks on a CPU, shapes alone are
    computed, with fake (meta) tensors. Raises UnfitError where a call fails.
    """
    shape = small_shape(backbone)
    weight = next(backbone.module.parameters())
    large = math.prod(shape) > SMALL or sum(p.numel() for p in backbone.module.parameters()) > LARGE
    hollow = large and weight.device.type == "cpu"
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) if hollow else nullcontext():
            cond = backbone.encode([""])
            x = torch.zeros(1, *shape, device=weight.device)
            t = torch.full((1,), float(backbone.schedule.t_max), dtype=torch.float64, device=weight.device)
            backbone.predict(backbone.module, x, t, cond)
            if isinstance(backbone, Latent):
                backbone.decode(x)
    except Exception as error:  # whatever a network raises for inputs that are not its own
        raise UnfitError(
            f"its parts do not go together ({reason(error)})", "check its configuration, or download it again"
        ) from error


def small_shape(backbone: Backbone) -> tuple[int, ...]:
    """Return the smallest state shape that a network takes without loss.

    A U-Net halves states at every level. Networks that are neither U-Nets nor of any size have one size.
    """
    if isinstance(backbone, Sized):
        most = backbone.small
    elif isinstance(backbone, WithUNet):
        most = 2 ** (len(backbone.pipe.unet.config.block_out_channels) + 1)
    else:
        return backbone.shape
    channels, *sides = backbone.shape
    return (channels, *(min(s, most) for s in sides))
