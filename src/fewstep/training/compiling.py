"""Networks compiled by torch during training.

Outside of training the networks are not compiled: previews have other shapes and are sampled as without
compilation.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Compiled:
    """Networks that are compiled within `switched_on`.

    The first call of each role and shape takes minutes, because the call compiles. Every shape is compiled
    separately, so the results of a run do not depend on the order of shapes, and a run resumes bit for bit.
    Raises ValueError if torch cannot compile.
    """

    def __init__(self, networks: Iterable[nn.Module], device: torch.device) -> None:
        try:
            torch.compile(torch.sin, dynamic=False)(torch.zeros(2, device=device))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"train.compile: got true, but torch cannot compile here ({reason}); "
                "install a C++ compiler (on a GPU: triton), or set it to false"
            ) from error
        self.networks = list({id(n): n for n in networks}.values())
        for network in self.networks:
            network.compile(dynamic=False)
        self.calls = [n._compiled_call_impl for n in self.networks]
        self._set([None] * len(self.networks))

    def _set(self, calls: Sequence[Callable[..., Any] | None]) -> None:
        for network, call in zip(self.networks, calls, strict=True):
            network._compiled_call_impl = call

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """Call the compiled networks within the block."""
        self._set(self.calls)
        try:
            yield
        finally:
            self._set([None] * len(self.networks))
