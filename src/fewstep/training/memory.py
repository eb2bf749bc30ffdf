"""Memory of a training, measured before the training.

One iteration of the real training runs on fake (meta) tensors, and every tensor is counted while the tensor
lives.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backbones.base import Backbone
from ..data.images import ImageData
from ..data.prompts import Embeddings
from ..data.trajectories import Trajectories
from ..methods.method import Method
from ..roles.roles import Roles
from .loop import TrainConfig, distill
from .optimizer import state_bytes


class MemoryTracker(TorchDispatchMode):
    """Counter of the bytes of all storages that operations allocate.

    Storages count until they are freed. `now` and `peak` are in bytes. The value of a fake (meta) tensor is
    reported as 1, so losses are finite and norms small.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._seen: set[int] = set()

    def add(self, *tensors: Tensor) -> None:
        """Count existing tensors; each storage counts once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._seen:
                self._seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0
        out = func(*args, **(kwargs or {}))
        self.add(*(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)))
        return out


def storage_bytes(*tensors: Tensor) -> int:
    """Return the bytes of these tensors, shared storages counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def module_bytes(*modules: nn.Module) -> int:
    """Return the bytes of the weights and buffers of networks."""
    return storage_bytes(*(t for m in modules for t in (*m.parameters(), *m.buffers())))


@dataclass(frozen=True)
class Training:
    """Bytes at the peak of a training, by purpose.

    `work` is temporary: activations, inputs kept for gradients, estimates.
    """

    base: int  # of the frozen denoiser; trained copies count as `trained`
    trained: int
    gradients: int
    optimiser: int
    average: int
    work: int

    @property
    def total(self) -> int:
        return self.base + self.trained + self.gradients + self.optimiser + self.average + self.work


def training_bytes(
    backbone: Backbone, make: Callable[[], Roles], method: Method, times: Tensor, config: TrainConfig, data: Embeddings
) -> Training:
    """Return the bytes of an iteration after the warm-up.

    The base may have fake (meta) tensors. `make` makes the roles on this backbone; `times` are the times of
    the trajectories that the method may need; a few prompts are enough as `data`. The state of an optimizer
    is counted by a formula, which needs no package. Raises ValueError as the training would.
    """
    states = torch.zeros(data.count, *backbone.shape)
    real = ImageData(states, data, "") if method.needs.images else None
    walks = torch.zeros(data.count, len(times), *backbone.shape)
    paths = Trajectories(walks, times, data, walks[:0], times, "") if method.needs.trajectories else None
    config = config.on(1)
    one = replace(config, iterations=1, decay=0, accumulate=min(config.accumulate, 2), optimizer="adamw")
    # One step needs as much memory as four: the steps without gradient hold less.
    begun = method.one_step()
    roles = make()  # outside of the tracker: unquantized base weights exist only before
    parameters = [p for role in roles.trained.values() for p in role.values()]
    held = [t for n in roles.networks.values() for t in (*n.parameters(), *n.buffers())]
    with MemoryTracker() as ledger:
        ledger.add(*held, *parameters, *roles.average.values())
        for _ in distill(roles, begun, data, one, real=real, paths=paths):
            pass
    trained, average = storage_bytes(*parameters), storage_bytes(*roles.average.values())
    base = storage_bytes(*held) - storage_bytes(
        *(p for n in roles.networks.values() for p in n.parameters() if p.requires_grad)
    )
    work = ledger.peak - base - 2 * trained - state_bytes(parameters, one.optimizer) - average
    return Training(base, trained, trained, state_bytes(parameters, config.optimizer), average, work)


def peak_bytes(run: Callable[[], object], *networks: nn.Module) -> int:
    """Return the peak bytes of `run` and these networks."""
    with MemoryTracker() as ledger:
        ledger.add(*(t for n in networks for t in (*n.parameters(), *n.buffers())))
        run()
    return ledger.peak
