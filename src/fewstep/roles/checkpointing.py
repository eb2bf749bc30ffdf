"""Gradient checkpointing of a network that serves several roles.

A block is recomputed as the role of the first computation. A backward pass often comes when the shared
network already serves another role; recomputing with the adapter that is active by then gives wrong gradients
and no error.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbones.parts import set_checkpointing

State = TypeVar("State")


def checkpoint_blocks(network: nn.Module, state: Callable[[], State], restore: Callable[[State], None]) -> None:
    """Make `network` keep only the inputs of blocks.

    `state()` returns the role that the network serves, always the same object until another role is served, and
    `restore` makes the network serve a role again.
    Raises ValueError for a network that is not made of blocks which diffusers can checkpoint.
    """

    def run(block: Callable[..., Tensor], *inputs: Any) -> Any:
        then = state()

        def again(*inputs: Any) -> Any:
            if (now := state()) is then:
                return block(*inputs)
            restore(then)
            try:
                return block(*inputs)
            finally:
                restore(now)

        return checkpoint(again, *inputs, use_reentrant=False)

    set_checkpointing(network, run)
