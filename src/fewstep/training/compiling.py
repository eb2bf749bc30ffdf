"""Networks compiled by torch during training.

Outside of training the networks are not compiled: previews have other shapes and are sampled as without
compilation.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import nn

from ..backbones.parts import repeated_blocks

# Compiled forms of one class of blocks: of each role, with and without gradient, at each width and batch size.
MOST_FORMS = 1024


class Compiled:
    """Networks that are compiled within `switched_on`.

    The blocks that a network repeats are compiled, once for all blocks of one class and shape; what is around them
    is not. A network without such blocks is compiled as a whole. The first call of each role and shape takes
    longer, because the call compiles. Every shape is compiled separately, so the results of a run do not depend on
    the order of shapes, and a run resumes bit for bit. Raises ValueError if torch cannot compile.
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
        whole = {id(n): n for n in networks}.values()
        self.parts = [part for network in whole for part in repeated_blocks(network) or [network]]
        for part in self.parts:
            part.compile(dynamic=False)
        self.calls = [part._compiled_call_impl for part in self.parts]
        self._set([None] * len(self.parts))

    def _set(self, calls: Sequence[Callable[..., Any] | None]) -> None:
        for part, call in zip(self.parts, calls, strict=True):
            part._compiled_call_impl = call

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """Call the compiled networks within the block."""
        self._set(self.calls)
        try:
            # Beyond its limit torch does not compile and does not say so.
            with torch._dynamo.config.patch(recompile_limit=MOST_FORMS, accumulated_recompile_limit=MOST_FORMS):
                yield
        finally:
            self._set([None] * len(self.parts))
