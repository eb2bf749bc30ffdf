"""Gradient checkpointing of a network that is several roles: what is computed again is computed as the role that it was then.

A backward pass often comes when the shared network is another role already. Recomputing with whatever adapter is active by then gives
wrong gradients and no error.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbones.parts import set_checkpointing

State = TypeVar("State")


def checkpoint_blocks(network: nn.Module, state: Callable[[], State], restore: Callable[[State], None]) -> None:
    """Let `network` keep only its blocks' inputs; `state()` says which role it is, `restore` makes it one again.

    Raises ValueError for a network that is not made of blocks which diffusers can check.
    """

    def run(block: Callable[..., Tensor], *inputs: Any) -> Any:
        then = state()

        def again(*inputs: Any) -> Any:
            if (now := state()) == then:
                return block(*inputs)
            restore(then)
            try:
                return block(*inputs)
            finally:
                restore(now)

        return checkpoint(again, *inputs, use_reentrant=False)

    set_checkpointing(network, run)
