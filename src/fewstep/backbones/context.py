"""Context parallelism: processes that share the tokens of every sample.

They compute one call together, each a part of the tokens. The engine is diffusers': each process sends the heads of its
tokens to the others before attention and gets its tokens back after it (Ulysses). Outputs are whole in every process. A
backward pass gives each process the gradients that flow through its own tokens: their sum over the processes is the
gradient of the loss. So a loss may depend on one network call with gradient, not on a chain of calls.
"""

import diffusers
import torch
from diffusers import ContextParallelConfig, ModelMixin
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models import ParallelConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

AXES = ("ring", "ulysses")  # the dimensions that diffusers wants of a mesh


def share_tokens(network: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Share the tokens of every call among neighbours.

    The neighbours are those in the last dimension of a mesh of `AXES`. All of them then have to call the network
    together, with the same inputs. Raises ValueError for a network that diffusers does not share, and for one whose
    heads cannot be shared evenly.
    """
    count, kind = mesh[AXES[1]].size(), type(network).__name__
    plan = network._cp_plan if isinstance(network, ModelMixin) else None
    processors = [vars(m).get("processor") for m in network.modules()]
    able = [p for p in processors if p is not None and "_parallel_config" in vars(type(p))]
    if plan is None or not able:
        raise ValueError(
            f"train.context: got {count}, but diffusers {diffusers.__version__} does not share the tokens of a {kind} "
            f"(it has {'no plan of what to split' if plan is None else 'attention of its own'}); set it to 1"
        )
    assert isinstance(network, ModelMixin)
    heads = int(network.config.num_attention_heads)
    if heads % count:
        raise ValueError(f"train.context: got {count}, allowed are divisors of the {heads} heads of a {kind}")
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=count, mesh=mesh))
    # What `network.enable_parallelism` does, which asks for a GPU.
    config.setup(mesh.get_rank(), mesh.size(), device, mesh=mesh)
    for processor in able:
        processor._parallel_config = config
    apply_context_parallel(network, config.context_parallel_config, plan)
