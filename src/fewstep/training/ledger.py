"""A count of the bytes of all tensors, while each lives."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backbones.kinds import Operations
from ..roles.sharding import local_part

Result = TypeVar("Result")
# Operations on lists of tensors that change these and allocate nothing. Fake tensors take long for them.
IN_PLACE = (
    torch.ops.aten._foreach_mul_,
    torch.ops.aten._foreach_lerp_,
    torch.ops.aten._foreach_add_,
    torch.ops.aten._fused_adamw_,
)
DEVICE = torch.ops.prim.device.default


class MemoryTracker(TorchDispatchMode):
    """Counter of the bytes of all storages that operations allocate.

    Storages count until they are freed. `now` and `peak` are in bytes. The value of a fake (meta) tensor is
    reported as 1, so losses are finite and norms small. `known` are the operations of an earlier count.
    """

    def __init__(self, known: Operations | None = None) -> None:
        super().__init__()
        self.known = Operations() if known is None else known
        self.now, self.peak = 0, 0
        self.operations = 0  # so far
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, *tensors: Tensor) -> None:
        """Count existing tensors, each storage once.

        Of a sharded tensor this process's part counts.
        """
        for tensor in tensors:
            storage = local_part(tensor).untyped_storage()
            key = storage._cdata
            if key not in self._seen:
                size = storage.nbytes()
                self._seen[key] = weakref.ref(storage, partial(self._gone, key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def leave_out(self, tensor: Tensor) -> None:
        """Count a tensor and its views as nothing.

        It stands for one that counts.
        """
        self.forget(tensor)
        storage = tensor.untyped_storage()
        self._seen[storage._cdata] = weakref.ref(storage, partial(self._gone, storage._cdata, 0))

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor as freed, although it still lives."""
        storage = tensor.untyped_storage()
        if self._seen.pop(storage._cdata, None) is not None:
            self.now -= storage.nbytes()

    def _gone(self, key: int, size: int, _: object) -> None:
        del self._seen[key]
        self.now -= size

    def reach(self, above: int) -> None:
        """Count bytes that came and went."""
        self.peak = max(self.peak, self.now + above)

    def above(self, run: Callable[[], Result]) -> tuple[Result, int, int]:
        """Return `run()`, the bytes at its peak, and those it leaves.

        Both are beyond what is there before.
        """
        before, peak = self.now, self.peak
        self.peak = before
        try:
            found = run()
            return found, self.peak - before, self.now - before
        finally:
            self.peak = max(self.peak, peak)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep the peak as it is within the block."""
        peak = self.peak
        try:
            yield
        finally:
            self.peak = peak

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, FakeTensor):
            if func is DEVICE:
                return first.fake_device
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1.0
        elif isinstance(first, list) and first and isinstance(first[0], FakeTensor) and _packet(func) in IN_PLACE:
            return None
        self.operations += 1
        out = self.known(func, args, kwargs or {})
        if isinstance(out, Tensor):
            self.add(out)
        elif out is not None:
            self.add(*(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)))
        return out


def _packet(func: Callable[..., Any]) -> object:
    return func.overloadpacket if isinstance(func, torch._ops.OpOverload) else None


def storage_bytes(*tensors: Tensor) -> int:
    """Return the bytes of tensors in this process, shared storages once."""
    storages = [local_part(t).untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def module_bytes(*modules: nn.Module) -> int:
    """Return the bytes of the weights and buffers of networks."""
    return storage_bytes(*(t for m in modules for t in (*m.parameters(), *m.buffers())))
