"""Conditions that a function of one's own makes of prompts.

Conditions are tensors [B, ...] of a fixed shape, the same in any batch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .modules import in_eval_mode

KINDS = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
FORM = "return a dictionary of dense tensors [prompts, ...], one row a prompt"
STEADY = "make each row from its own prompt alone, without dropout or noise (encoder.eval())"
CLOSE = 0.02  # of the largest number: what batches of another size may round otherwise
Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]


def made_conditions(function: Callable[..., Any], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return what `function` makes of prompts, without gradient.

    Raises ValueError that names `conditions`, where the result is of no use.
    """
    with in_eval_mode(function) if isinstance(function, nn.Module) else nullcontext():
        found = _called(function, prompts)
    count = len(prompts)
    if not isinstance(found, Mapping) or not all(isinstance(k, str) for k in found):
        raise ValueError(
            f"conditions: got a {type(found).__name__} for {count} prompts; {FORM}, named as the network's arguments"
        )
    for key, value in found.items():
        if wrong := _wrong(value, count):
            raise ValueError(f"conditions: {key} is {wrong} for {count} prompts; {FORM}")
    return {k: v.detach().clone() if v.is_inference() else v.detach() for k, v in found.items()}


def _called(function: Callable[..., Any], prompts: Sequence[str]) -> Any:
    try:
        with torch.no_grad():
            return function(prompts)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what somebody else wrote may raise anything
        if len(prompts) > 1:
            for prompt in prompts:  # which one it is
                _called(function, [prompt])
        said = " ".join(str(error).split())[:160]
        raise ValueError(
            f"conditions: {type(error).__name__}{f' ({said})' if said else ''} for {_shown(prompts)}; "
            'take a list of prompts, the empty one "" among them, and ' + FORM
        ) from error


def _shown(prompts: Sequence[str]) -> str:
    return f"the prompt {prompts[0][:60]!r}" if len(prompts) == 1 else f"{len(prompts)} prompts"


def _wrong(value: object, count: int) -> str:
    """Say what is wrong with one condition; empty for nothing."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "no dense tensor"
    if value.dtype not in KINDS:
        return f"of {str(value.dtype).removeprefix('torch.')}"
    if value.ndim == 0 or len(value) != count:
        return f"{list(value.shape)}"
    return "NaN in places" if value.is_floating_point() and bool(value.isnan().any()) else ""


def require_same_shape(cond: Mapping[str, Tensor], null: Mapping[str, Tensor]) -> None:
    """Check that prompts have the empty prompt's conditions.

    The conditions have the same names, shapes and types. Raises ValueError.
    """
    if cond.keys() != null.keys():
        raise ValueError(
            f"conditions: got {_names(cond)} for prompts and {_names(null)} for the empty one; "
            "return the same names for all"
        )
    for key, value in cond.items():
        if value.shape[1:] != null[key].shape[1:]:
            raise ValueError(
                f"conditions: a row of {key} is {list(value.shape[1:])} for some prompts and "
                f"{list(null[key].shape[1:])} for the empty one; "
                "pad all to one fixed length, not to the longest of a batch, and return a mask of what is padded"
            )
        if value.dtype != null[key].dtype:
            raise ValueError(
                f"conditions: {key} is {value.dtype} for some prompts and {null[key].dtype} for the empty one; "
                "return one type"
            )


def _names(cond: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted(cond)) or "nothing"


def require_steady(encode: Encode, prompts: Sequence[str]) -> None:
    """Check that a prompt has the same conditions in any batch.

    A second call must return the same, too. Raises ValueError.
    """
    asked = list(dict.fromkeys([*prompts[:1], min(prompts, key=len), max(prompts, key=len), ""]))
    together = encode(asked)
    for other, cause in (
        (lambda: encode(asked), "when it is asked again"),
        (lambda: _alone(encode, asked), "alone than with others"),
    ):
        found = other()
        require_same_shape(found, together)
        if odd := next((k for k, v in found.items() if not _close(v, together[k])), None):
            raise ValueError(f"conditions: {odd} of a prompt is another {cause}; {STEADY}")


def _alone(encode: Encode, prompts: Sequence[str]) -> dict[str, Tensor]:
    parts = [encode([p]) for p in prompts]
    for part in parts:
        require_same_shape(part, parts[-1])
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.double().nan_to_num(), b.double().nan_to_num()  # infinite ones are masks
    return float((a - b).abs().amax() if a.numel() else 0) <= CLOSE * float(b.abs().amax() if b.numel() else 0)
