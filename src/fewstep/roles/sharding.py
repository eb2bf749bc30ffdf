"""Weights spread over processes, block by block (torch's `fully_shard`, FSDP2): each holds its part of all, and the whole of one block while it works.

What lies outside the blocks (the first and last layers, the time embedding) stays whole everywhere, as do heads and step conditions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..backbones.parts import blocks_of

OLDEST = (2, 7)  # torch before it cannot leave parameters out of `fully_shard`


def shard(network: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Spread a network over the processes of `mesh`, each its part on its own `device`.

    It may be on the CPU before: a card then never holds more than its part and one block. Its blocks' parameters are others afterwards,
    under the same names. Raises ValueError with one line for a network without blocks, and where torch is too old.
    """
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < OLDEST:
        raise ValueError(
            f"train.shard: needs torch {'.'.join(map(str, OLDEST))} or newer, this is {torch.__version__}; update it, or set it to false"
        )
    for block in blocks_of(network):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    outside = {p for p in network.parameters() if not isinstance(p, DTensor)}
    for tensor in (*outside, *network.buffers()):
        tensor.data = tensor.data.to(device)
    # Of the network as a whole nothing is spread: what its blocks share is that one block is fetched while another works.
    fully_shard(network, mesh=mesh, ignored_params=outside)


def is_sharded(network: nn.Module) -> bool:
    """Whether every call of it needs all processes."""
    return isinstance(network, FSDPModule)


def fetch_for(output: Tensor, network: nn.Module, layer: str) -> None:
    """Fetch the blocks around `network.layer` when a gradient enters at its `output`: of themselves they wait for one at their own outputs."""
    ends = [i for i, c in enumerate(layer) if c == "."] + [len(layer)]
    around = [m for i in ends if isinstance(m := network.get_submodule(layer[:i]), FSDPModule)]

    def fetch(_: Tensor) -> None:
        for block in around:
            block.unshard()

    if output.requires_grad:
        output.register_hook(fetch)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all have, spread as `like` is; the tensor itself where `like` is not, or where it is spread already."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """The same tensors gathered from all processes, all of which have to ask, onto the CPU; those that do not `keep` them get nothing."""
    gathered = ((n, t.full_tensor().cpu() if isinstance(t, DTensor) else t) for n, t in tensors.items())
    return {n: t for n, t in gathered if keep}


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their norm, over all parameters and all processes' parts, is `limit` at most; returns what it was."""
    groups = [group for group in by_kind(parameters) if group]
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def by_kind(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those that are spread, whose gradients are means over processes already, and those that every process has whole."""
    spread = [isinstance(p, DTensor) for p in parameters]
    return [p for p, s in zip(parameters, spread, strict=True) if s], [
        p for p, s in zip(parameters, spread, strict=True) if not s
    ]
