"""Networks compiled by torch while they are trained, and then alone: pictures come in other shapes and are drawn as ever."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Compiled:
    """Networks that are called compiled within `switched_on`; the first call of each role and shape there takes minutes, for it compiles.

    Every shape is compiled by itself, so that what a run computes does not depend on which came first and it resumes bit for bit.
    Raises ValueError where torch cannot compile.
    """

    def __init__(self, networks: Iterable[nn.Module], device: torch.device) -> None:
        try:
            torch.compile(torch.sin, dynamic=False)(torch.zeros(2, device=device))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"train.compile: got true, but torch cannot compile here ({reason}); install a C++ compiler (on a GPU: triton), or set it to false"
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
        """Within it the networks are called as they were compiled."""
        self._set(self.calls)
        try:
            yield
        finally:
            self._set([None] * len(self.networks))
