"""Operations on fake (meta) tensors, of which each kind is made once.

Torch takes about 0.3 ms to find the shape that an operation gives. An operation like an earlier one, on tensors of the
same shapes, gives the same shapes again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that only write numbers into their first input, which tensors without numbers need not.
FILLS = (
    torch.ops.aten.uniform_.default,
    torch.ops.aten.normal_.default,
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.zero_.default,
)
UNKNOWN = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view


@dataclass(frozen=True)
class Kind:
    """What a tensor is, but for its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    graded: bool

    @staticmethod
    def of(t: Tensor) -> "Kind":
        """Return a tensor's kind."""
        return Kind(t.shape, t.stride(), t.dtype, t.requires_grad)

    def made(self, like: Tensor) -> Tensor:
        """Return a tensor of this kind, without numbers."""
        return like.new_empty_strided(self.shape, self.stride, dtype=self.dtype)


def kind_of(value: object) -> object:
    """Return a tensor's kind, and all else unchanged."""
    return Kind.of(value) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Way:
    """How an operation's outputs come from its inputs.

    `kinds` are those of new tensors. With `view` they are views of the first input, from `offsets` on. Without kinds
    the first input is the output. With `listed` the outputs are a sequence, in which None stands for no tensor.
    """

    kinds: tuple[Kind | None, ...] = ()
    offsets: tuple[int, ...] = ()
    view: bool = False
    listed: type | None = None


class Operations:
    """Operations so far, by their kinds."""

    def __init__(self) -> None:
        self._ways = dict[object, Way | None]()
        self._form = dict[object, str]()  # of operators

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what `func(*args, **kwargs)` gives.

        Operations whose tensors are not all fake, or whose outputs depend on numbers, are always made.
        """
        form = self._form.get(func)
        if form is None:
            form = self._form.setdefault(func, form_of(func))
        first = fake(args)
        key = None if not form or first is None else key_of(first.fake_mode, func, args, kwargs)
        if key is None or first is None:
            return func(*args, **kwargs)
        if key in self._ways:
            way = self._ways[key]
            return func(*args, **kwargs) if way is None else made(way, first)
        out = func(*args, **kwargs)
        self._ways[key] = way_of(form, out, args[0])
        return out


class Unfilled(TorchDispatchMode):
    """Make operations on fake tensors once, and fill no meta tensors.

    For building networks: most of the time goes to first weights, of which tensors without numbers have none.
    """

    def __init__(self, known: Operations | None = None) -> None:
        super().__init__()
        self.known = Operations() if known is None else known

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in FILLS and isinstance(first := args[0], Tensor) and (isinstance(first, FakeTensor) or first.is_meta):
            return first
        return self.known(func, args, kwargs or {})


def form_of(func: Callable[..., Any]) -> str:
    """Return what an operator gives.

    `new` tensors, a `view` of its first input, or its first input changed `in place`; empty for all others.
    """
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten" or any(t in UNKNOWN for t in func.tags):
        return ""
    schema = func._schema
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    aliases = [r.alias_info for r in schema.returns]
    if not any(written):
        if all(a is None for a in aliases):
            return "new"
        seen = [a.alias_info is not None for a in schema.arguments]
        return "view" if seen[0] and sum(seen) == 1 else ""
    same = len(aliases) == 1 and aliases[0] is not None and written[0] and sum(written) == 1
    return "in place" if same and func.overloadpacket not in (torch.ops.aten.set_, torch.ops.aten.resize_) else ""


def fake(values: Sequence[Any]) -> FakeTensor | None:
    """Return the first fake tensor, also in lists."""
    for value in values:
        found = value if isinstance(value, FakeTensor) else fake(value) if isinstance(value, list | tuple) else None
        if found is not None:
            return found
    return None


def key_of(mode: FakeTensorMode, func: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """Return what decides an operation's outputs.

    None if that is not known.
    """
    key = (id(mode), func, *parts_of(mode, args), *kwargs, *parts_of(mode, tuple(kwargs.values())))
    return None if None in key else key


def parts_of(mode: FakeTensorMode, values: Sequence[Any]) -> Iterator[object]:
    """Yield what decides about each value.

    None where that is not known.
    """
    for v in values:
        if isinstance(v, FakeTensor):
            yield (v.shape, v.stride(), v.dtype, v.storage_offset()) if v.fake_mode is mode else None
        elif isinstance(v, list | tuple):
            inner = tuple(parts_of(mode, v))
            yield None if None in inner else inner
        elif isinstance(v, Tensor | torch.Generator):
            yield None
        else:
            yield type(v), v  # 1, 1.0 and True are equal


def way_of(form: str, out: Any, first: object) -> Way | None:
    """Return how outputs came from the first input.

    None if that cannot be told.
    """
    if form == "in place":
        return Way() if out is first else None
    listed = [out] if isinstance(out, Tensor) else out
    if not isinstance(listed, list | tuple) or not all(isinstance(t, FakeTensor | None) for t in listed):
        return None
    outputs = [t for t in listed if t is not None]
    view = form == "view"
    if not outputs or (view and len(outputs) < len(listed)):
        return None
    address = [t.untyped_storage()._cdata for t in outputs]
    if view:
        if not isinstance(first, FakeTensor) or any(t.dtype != first.dtype for t in outputs):
            return None
        if any(a != first.untyped_storage()._cdata for a in address):
            return None
    elif len(set(address)) < len(address) or any(t.storage_offset() for t in outputs):
        return None
    kinds = tuple(None if t is None else Kind(t.shape, t.stride(), t.dtype, False) for t in listed)
    offsets = tuple(t.storage_offset() for t in outputs) if view else ()
    return Way(kinds, offsets, view, None if isinstance(out, Tensor) else type(out))


def made(way: Way, first: FakeTensor) -> Any:
    """Return the outputs of an operation that is not made."""
    if not way.kinds:
        return first
    mode, device = first.fake_mode, first.fake_device
    if way.view:
        with in_kernel_invocation_manager(mode):
            outputs = [
                torch.ops.aten.as_strided.default(first, k.shape, k.stride, offset)
                for k, offset in zip(way.kinds, way.offsets, strict=True)
                if k is not None
            ]
    else:
        outputs = [k and torch.empty_strided(k.shape, k.stride, dtype=k.dtype, device="meta") for k in way.kinds]
    wrapped = [None if t is None else FakeTensor(mode, t, device) for t in outputs]
    return wrapped[0] if way.listed is None else way.listed(wrapped)
