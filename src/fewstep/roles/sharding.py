"""Weights sharded over processes, block by block (torch's `fully_shard`, FSDP2).

Each process holds one part of all blocks, and one whole block while the block computes. Everything outside
the blocks (the first and last layers, the time embedding) stays whole in every process, as do heads and step
conditions.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from ..backbones.parts import blocks_of


def shard(network: nn.Module, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Shard a network over the processes of `mesh`.

    A mesh of two dimensions holds a replica of the parts in each row (HSDP). With `dtype` the blocks are fetched and
    computed in it, while parts and their gradients keep their own precision.

    Each process keeps one part on the process's own `device`. The network may be on the CPU before: a GPU
    then never holds more than one part and one block. The parameters of blocks are replaced, under the same
    names. Raises ValueError with one line for a network without blocks.
    """
    # Autocast casts what a layer takes, and leaves alone what has to stay in single precision, such as times.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    for block in blocks_of(network):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    outside = {p for p in network.parameters() if not isinstance(p, DTensor)}
    for tensor in (*outside, *network.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    # The network itself shards nothing. As the root, it fetches one block while another block computes.
    fully_shard(network, mesh=mesh, ignored_params=outside)


def empty(network: nn.Module) -> dict[str, Tensor]:
    """Replace the weights and buffers of a network by meta tensors.

    Returns them by name. Tied weights stay tied, and are returned under one name.
    """
    found, hollow = dict[str, Tensor](), dict[int, Tensor]()
    for path, module in network.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in hollow:
                    bare = tensor.detach().to("meta")
                    hollow[id(tensor)] = (
                        nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
                    )
                    found[f"{path}.{name}".removeprefix(".")] = tensor.detach()
                held[name] = hollow[id(tensor)]
    return found


@torch.no_grad()
def receive(network: nn.Module, weights: dict[str, Tensor], mesh: DeviceMesh, device: torch.device) -> None:
    """Fill a sharded network of meta tensors with the first process's weights.

    One tensor at a time is whole, on `device`, and `weights` loses it then. The weights of the other processes are not
    read. All processes have to call.
    """
    network.to_empty(device=device)
    whole_everywhere = [Replicate()] * mesh.ndim
    for name, own in (*network.named_parameters(), *network.named_buffers()):
        if distributed.get_rank() == 0:
            tensor = weights.pop(name).to(device)
        else:
            tensor = torch.empty(own.shape, dtype=own.dtype, device=device)
        to = own.placements if isinstance(own, DTensor) else whole_everywhere
        given = distribute_tensor(tensor, mesh, to, src_data_rank=0)
        own.copy_(given if isinstance(own, DTensor) else given.to_local())


@torch.no_grad()
def copy_parts(network: nn.Module, of: nn.Module, device: torch.device) -> None:
    """Fill a sharded network of meta tensors from another one.

    The other network is sharded alike: every process copies its own parts.
    """
    network.to_empty(device=device)
    there = dict((*of.named_parameters(), *of.named_buffers()))
    for name, own in (*network.named_parameters(), *network.named_buffers()):
        own.copy_(there[name])


def is_sharded(network: nn.Module) -> bool:
    """Return whether every call of the network needs all processes."""
    return isinstance(network, FSDPModule)


def sum_gradients(network: nn.Module, wanted: bool, keep_whole: bool) -> None:
    """Set whether backward passes sum gradients over processes.

    Otherwise gradients of several passes add up.
    `keep_whole` keeps the gradients of whole blocks in every process, without any communication. Otherwise they are
    still summed within each replica, so that a process keeps its part alone.
    """
    if isinstance(network, FSDPModule):
        if keep_whole:
            network.set_requires_gradient_sync(wanted)
        else:
            network.set_requires_all_reduce(wanted)


def fetch_for(output: Tensor, network: nn.Module, layer: str) -> None:
    """Fetch blocks when a gradient enters at an inner layer's `output`.

    The blocks around `network.layer` would otherwise wait for a gradient at the blocks' own outputs.
    """
    ends = [i for i, c in enumerate(layer) if c == "."] + [len(layer)]
    around = [m for i in ends if isinstance(m := network.get_submodule(layer[:i]), FSDPModule)]

    def fetch(_: Tensor) -> None:
        for block in around:
            block.unshard()

    if output.requires_grad:
        output.register_hook(fetch)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor, sharded as `like` is.

    All processes hold the tensor. A tensor is returned unchanged if `like` is not sharded, or if the tensor
    is sharded already.
    """
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, or the tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part.detach()


def whole(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors on the CPU by name, gathered from all processes.

    A device never holds more than one whole tensor. All processes have to take all tensors, in the same
    order.
    """
    for name, tensor in tensors.items():
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Clip all gradients to a total norm of at most `limit`.

    The norm is over all parameters and over the parts of all processes. Returns the norm before clipping.
    """
    groups = [group for group in by_kind(parameters) if group]
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def by_kind(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return sharded and whole parameters as two lists.

    Gradients of sharded parameters are means over processes already; every process has the other parameters
    whole.
    """
    spread = [isinstance(p, DTensor) for p in parameters]
    return [p for p, s in zip(parameters, spread, strict=True) if s], [
        p for p, s in zip(parameters, spread, strict=True) if not s
    ]
