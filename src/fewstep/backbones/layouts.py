"""Layers of a network under the names of the original program.

A program may have several layers of diffusers as the rows of one layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from diffusers.models.normalization import AdaLayerNormContinuous
from torch import nn


@dataclass(frozen=True)
class Layout:
    """How an original program calls the layers of a network.

    `outside` maps diffusers' names of layers to the original ones. `blocks` maps diffusers' name of a list of blocks
    to the original name and to the layers inside a block. Of layers that are rows of one layer, the first rows come
    first.
    """

    outside: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)

    def names(self, network: nn.Module) -> Iterator[tuple[str, str]]:
        """Yield (diffusers' name, original name) of every layer that has both."""
        own = {n for n, _ in network.named_modules()}
        yield from ((name, original) for name, original in self.outside.items() if name in own)
        for kind, (original, layers) in self.blocks.items():
            count = 0
            while f"{kind}.{count}" in own:
                for name, theirs in layers.items():
                    if f"{kind}.{count}.{name}" in own:
                        yield f"{kind}.{count}.{name}", f"{original}.{count}.{theirs}"
                count += 1


def shift_first(network: nn.Module) -> frozenset[str]:
    """Return the layers whose halves original programs have the other way.

    Layers of scale and shift here, of shift and scale there.
    """
    return frozenset(f"{n}.linear" for n, m in network.named_modules() if isinstance(m, AdaLayerNormContinuous))
