"""Discriminator heads on features of the teacher or the fake score.

The heads are conditioned on the noise level, the step count and, through the features, the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.base import Backbone, Cond
from .sharding import fetch_for, is_sharded


class _Enough(Exception):  # noqa: N818 - no error: all wanted features are computed, the rest is skipped
    pass


def features(backbone: Backbone, network: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
    """Return features of a network as tokens.

    The features are the outputs of `backbone.feature_layers` at x [B, ...] and t [B], as tokens [B, N, C] in
    single precision. The network stops after the last layer. Gradients flow through x. Raises ValueError for
    a backbone that names no layers.
    """
    layers = backbone.feature_layers
    if not layers:
        raise ValueError(
            "method.gan: this network names no layers to look at; name them in Denoiser(feature_layers=(...)), or "
            "set method.gan.weight=0"
        )
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        found[name] = output
        if is_sharded(network):
            fetch_for(output, network, name)
        elif len(found) == len(layers):  # the blocks of a sharded network have to finish a pass
            raise _Enough

    handles = [
        network.get_submodule(n).register_forward_hook(lambda _, __, output, n=n: keep(n, output)) for n in layers
    ]
    try:
        backbone.predict(network, x, t, cond)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [_tokens(found[n]).float() for n in layers]


def _tokens(x: Tensor) -> Tensor:
    """Reshape [B, C, ...] and [B, C] to [B, N, C].

    A tensor [B, N, C] is returned unchanged.
    """
    if x.ndim == 3:
        return x
    return x[:, None] if x.ndim == 2 else x.flatten(2).mT


class Heads(nn.Module):
    """One small head per feature.

    Each head maps normalised tokens to one logit per token, modulated by noise level and step count.
    """

    def __init__(self, widths: Sequence[int], counts: int, width: int = 128) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(w, elementwise_affine=False), nn.Linear(w, width)) for w in widths
        )
        self.told = nn.ModuleList(nn.Linear(2 + counts, 2 * width) for _ in widths)
        self.outputs = nn.ModuleList(nn.Linear(width, 1) for _ in widths)

    def forward(self, tokens: Sequence[Tensor], told: Tensor) -> Tensor:
        """Return the logits [B, N] of all tokens of all features.

        `told` [B, 2 + counts] is the condition: two numbers for the noise level, and the step count as
        one-hot.
        """
        logits = []
        for x, inner, modulation, out in zip(tokens, self.inputs, self.told, self.outputs, strict=True):
            scale, shift = modulation(told)[:, None].chunk(2, dim=2)
            logits.append(out(F.silu(inner(x) * (1 + scale) + shift))[..., 0])
        return torch.cat(logits, 1)


@dataclass(frozen=True)
class Discriminator:
    """Discriminator heads on features of networks of one kind.

    `counts` are the step counts that the heads are conditioned on.
    """

    backbone: Backbone
    heads: Heads
    counts: tuple[int, ...]

    def logits(self, tokens: Sequence[Tensor], tau: Tensor, steps: int) -> Tensor:
        """Return the logits [B, N] of tokens at tau [B]."""
        schedule = self.backbone.schedule
        angle = torch.atan2(schedule.sigma(tau), schedule.alpha(tau)).float()  # finite at both ends, unlike the log-SNR
        level = torch.stack([torch.cos(2 * angle), torch.sin(4 * angle)], 1)
        count = [torch.full_like(angle, float(steps == k)) for k in self.counts]
        return self.heads(tokens, torch.cat([level, torch.stack(count, 1)], 1))


def make_discriminator(backbone: Backbone, network: nn.Module, counts: Sequence[int], seed: int) -> Discriminator:
    """Return a discriminator with heads that fit the backbone's features.

    The heads are on the backbone's device, those of a backbone of meta tensors on the CPU.
    """
    device = next(network.parameters()).device
    cond = {k: v[:1].to(device) for k, v in backbone.encode([""]).items()}
    with torch.no_grad():
        t = torch.full((1,), backbone.schedule.t_max, dtype=torch.float64, device=device)
        widths = [
            f.shape[2] for f in features(backbone, network, torch.zeros(1, *backbone.shape, device=device), t, cond)
        ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = Heads(widths, len(counts)).to("cpu" if device.type == "meta" else device)
    return Discriminator(backbone, heads, tuple(counts))
