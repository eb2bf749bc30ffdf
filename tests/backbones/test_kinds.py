"""An operation on fake tensors that was made before gives the same again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fewstep.backbones.kinds import Kind, Operations, Unfilled, form_of

ATEN = torch.ops.aten
CASES: dict[str, tuple[Any, Callable[[Tensor], tuple[Any, ...]], dict[str, Any]]] = {
    "new": (ATEN.mm.default, lambda x: (x, x), {}),
    "promoted": (ATEN.add.Tensor, lambda x: (x, x.double()), {}),
    "number": (ATEN.mul.Tensor, lambda x: (x, 2.0), {}),
    "cast": (ATEN._to_copy.default, lambda x: (x,), {"dtype": torch.bfloat16}),
    "strided": (ATEN.clone.default, lambda x: (x.t(),), {}),
    "listed": (ATEN.cat.default, lambda x: ([x, x], 1), {}),
    "view": (ATEN.transpose.int, lambda x: (x, 0, 1), {}),
    "view with an offset": (ATEN.slice.Tensor, lambda x: (x, 0, 2, 4), {}),
    "views": (ATEN.split.Tensor, lambda x: (x, 2), {}),
    "several": (ATEN.max.dim, lambda x: (x, 1), {}),
    "none": (
        ATEN.convolution_backward.default,
        lambda x: (
            *(x[None, None], x[None, None], x[None, None, :1, :1], None),
            *([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]),
        ),
        {},
    ),
    "in place": (ATEN.add_.Tensor, lambda x: (x, x), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_second_is_like_the_first(name: str) -> None:
    func, inputs, kwargs = CASES[name]
    operations, mode = Operations(), FakeTensorMode()
    found = []
    for _ in range(3):
        with mode:
            args = inputs(torch.empty(8, 8))
        given = next(a for a in tree_leaves(args) if isinstance(a, Tensor))
        out = operations(func, args, kwargs)
        leaves = tree_leaves(out)
        assert (out is given) == (name == "in place")
        shared = [
            isinstance(t, Tensor) and t.untyped_storage()._cdata == given.untyped_storage()._cdata for t in leaves
        ]
        assert all(isinstance(t, Tensor | None) for t in leaves) and all(shared) == ("view" in name or out is given)
        kinds: list[object] = [t if t is None else (t.stride(), t.dtype, t.storage_offset()) for t in leaves]
        kinds += [None if t is None else (t.shape, t.untyped_storage().nbytes()) for t in leaves]
        kinds += [type(t) for t in (out, *leaves)]
        found.append(kinds)
    assert found[0] == found[1] == found[2]
    assert any(operations._ways.values())


def test_operations_whose_outputs_depend_on_numbers_are_always_made() -> None:
    always = ATEN.nonzero.default, ATEN._local_scalar_dense.default, ATEN.resize_.default, ATEN.t_.default
    assert [form_of(f) for f in always] == [""] * 4
    assert [form_of(f) for f in (ATEN.mm.default, ATEN.t.default, ATEN.add_.Tensor)] == ["new", "view", "in place"]


def test_other_inputs_and_real_ones_are_not_mixed_up() -> None:
    operations, mode = Operations(), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x, wide = torch.empty(4, 2), torch.empty(4, 6)
    assert operations(ATEN.add.Tensor, (x, 1), {}).shape == (4, 2)
    assert operations(ATEN.add.Tensor, (wide, 1), {}).shape == (4, 6)
    ints = [operations(ATEN.mul.Tensor, (x.long(), k), {}).dtype for k in (1, 1.0, True)]
    assert ints == [torch.int64, torch.float32, torch.int64]
    assert operations(ATEN.add.Tensor, (torch.ones(2), 1), {}).tolist() == [2, 2]
    assert operations(ATEN.add.Tensor, (torch.zeros(2), 1), {}).tolist() == [1, 1]
    with FakeTensorMode():
        other = torch.empty(4, 2)
    assert operations(ATEN.add.Tensor, (other, 1), {}).fake_mode is not x.fake_mode  # type: ignore[attr-defined]


def test_networks_are_built_alike_without_first_weights() -> None:
    def block() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(9, 8)
        )

    for place in (lambda: FakeTensorMode(), lambda: torch.device("meta")):
        with place():
            plain = block()
        with place(), Unfilled():
            quick = block()
        own, same = plain.state_dict(), quick.state_dict()
        assert list(own) == list(same)
        assert [Kind.of(t) for t in own.values()] == [Kind.of(t) for t in same.values()]
        assert [type(t) for t in own.values()] == [type(t) for t in same.values()]
        assert len({t.untyped_storage()._cdata for t in same.values()}) == len(same)
    with Unfilled():
        assert nn.init.ones_(torch.empty(2)).tolist() == [1, 1]
