"""A model once more, around the same weights: modules of its own for a run or a student to change, so that nobody else's change."""

import copy
from typing import Any, TypeVar

from torch import nn

from .base import Backbone
from .few_step import with_network
from .modules import without_fast_path
from .parts import DiffusersBackbone

Model = TypeVar("Model", bound=Backbone)


def apart(backbone: Model) -> Model:
    """The same model with a network of its own around the same tensors: adapters, hooks and rounding in one do not show in the other.

    No memory but that of the modules. Weights that are trained in place change in both. Raises ValueError for a network that
    cannot be copied, and for a model whose network cannot be put in its place.
    """
    network = around_same_weights(backbone.module, backbone.name, isinstance(backbone, DiffusersBackbone))
    again = copy.copy(backbone)
    if isinstance(backbone, DiffusersBackbone):
        pipe = backbone.pipe
        object.__setattr__(again, "pipe", with_network(pipe, network, pipe.scheduler, type(pipe)))
        return again
    try:
        object.__setattr__(again, "module", network)
    except AttributeError as error:
        raise ValueError(
            f"teacher: the network of a {type(backbone).__name__} cannot be replaced ({error}); make `module` a field of it, as in fewstep.Denoiser"
        ) from error
    return again


def rested(backbone: Model) -> Model:
    """Return a model whose calls change nothing of it: apart from a network of one's own, or from one in training mode."""
    still = isinstance(backbone, DiffusersBackbone) and not any(m.training for m in backbone.module.modules())
    return backbone if still else apart(backbone)


def around_same_weights(network: nn.Module, name: str, share_buffers: bool = False) -> nn.Module:
    """Copy modules around the same weights, tied where they are tied, frozen and in eval mode. Raises ValueError where Python cannot copy them.

    Buffers are copied unless they are to be shared: networks of one's own may write into theirs when they are called.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    memo |= {id(b): b if share_buffers else b.detach().clone() for b in network.buffers()}
    try:
        return without_fast_path(copy.deepcopy(network, memo).eval())
    except Exception as error:  # what a module of one's own holds may raise anything
        raise ValueError(
            f"teacher: the network of {name} cannot be copied ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "keep in it what copy.deepcopy takes: parameters, buffers, modules and plain values"
        ) from error
