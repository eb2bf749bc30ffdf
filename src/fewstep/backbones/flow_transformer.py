"""What transformers for rectified flow have in common.

Sizes, shifts of times, patches and their places.
The pipelines of these families tell their scheduler K sigmas and, by the image's size, a shift of time.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..core.schedule import Flow
from .parts import Sized
from .schedulers import TOLD_SIGMAS

SMALL = 16  # height and width of small states
PIXELS = 1024  # height and width of the images that these pipelines make by default
TEXT = 512  # tokens of a prompt, as the pipelines cut it


def pack(x: Tensor, patch: int = 2) -> Tensor:
    """Return states as tokens.

    States [B, C, h, w], tokens [B, h w / patch^2, patch^2 C]. A token is a patch of `patch` x `patch` positions.
    """
    return pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int, patch: int = 2) -> Tensor:
    """Return tokens as states [B, C, height, width], the inverse of `pack`."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // patch, width // patch)), patch)


def places(height: int, width: int, axes: int, device: torch.device) -> Tensor:
    """Return the positions of `height` x `width` tokens, float32.

    [height width, axes]: rows on axis 1, columns on axis 2, zero on the others.
    """
    ids = torch.zeros(height, width, axes, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)[None, :]
    return ids.reshape(height * width, axes)


def lengths(mask: Tensor) -> list[int]:
    """Count the tokens of each text that a mask keeps.

    The mask is [B, L]. All of them where only shapes are computed, with fake (meta) tensors.
    """
    if isinstance(mask, FakeTensor):
        return [mask.shape[1]] * len(mask)
    counts: list[int] = mask.sum(1).tolist()
    return counts


def linear_mu(config: Mapping[str, Any], tokens: int) -> float:
    """Return the shift's logarithm, linear in the number of tokens.

    From `base_shift` at `base_image_seq_len` to `max_shift` at `max_image_seq_len`; these are settings of a
    scheduler.
    """
    few, many = config["base_image_seq_len"], config["max_image_seq_len"]
    low, high = config["base_shift"], config["max_shift"]
    slope = (high - low) / (many - few)
    return float(tokens * slope + (low - slope * few))


@dataclass(frozen=True)
class FlowTransformer(Sized):
    """A latent backbone with a transformer for rectified flow, of any size.

    `schedule` is shifted as the pipeline shifts an image of this size.
    """

    @classmethod
    def of(cls, pipe: DiffusionPipeline, name: str) -> Self:
        """Return the backbone of a pipeline for its default size."""
        return cls(pipe, name, Flow()).at(0)

    def at(self, size: int) -> Self:
        sized = replace(self, size=size)
        return replace(sized, schedule=Flow(shift=sized.shift))

    @property
    def channels(self) -> int:
        """Channels of a state."""
        return int(self.pipe.transformer.config.in_channels) // self.patch**2

    @property
    def patch(self) -> int:
        """Side of the patches that are packed into tokens."""
        return 2

    @property
    def shape(self) -> tuple[int, ...]:
        side = self.size or PIXELS // self.pixels
        return (self.channels, side, side)

    @property
    def multiple(self) -> int:
        return self.patch

    @property
    def small(self) -> int:
        return SMALL

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return (self.shape[-1] // self.patch) ** 2

    def mu(self, tokens: int) -> float:
        """Return what the pipeline calls mu for so many tokens."""
        return linear_mu(self.pipe.scheduler.config, tokens)

    @property
    def shift(self) -> float:
        """The shift of time for this size."""
        config = self.pipe.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        mu = self.mu(self.tokens)
        return mu if config.time_shift_type == "linear" else math.exp(mu)

    def stock_shift(self, steps: int) -> float:
        """Return the shift that the pipeline tells its own scheduler.

        For so many steps, at this size.
        """
        return self.shift

    def stock_sigmas(self, times: Sequence[float]) -> list[float]:
        """Return the sigmas that lead the pipeline's own scheduler to `times`.

        `times` are without clean data. The scheduler must not stretch them: where it has a `shift_terminal`,
        that has to be null.
        """
        grid = torch.tensor(list(times), dtype=torch.float64)
        return [round(u, 8) for u in Flow(shift=self.stock_shift(len(times))).fraction(grid).tolist()]

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Settings of the pipeline's scheduler, with the shift for this size."""
        own = {"shift": self.shift, "use_dynamic_shifting": False, TOLD_SIGMAS: True}
        return {**self.pipe.scheduler.config, **own}

    @property
    @abstractmethod
    def time_layer(self) -> str: ...
