"""The precision in which a run's networks compute.

A GPU is told here what it may do faster in this precision.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from ..backbones.parts import WithUNet
from ..roles.adapters import keep_input_dtype
from ..roles.roles import Roles

Precision = Literal["no", "bf16"]
WORKSPACE, FIXED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # read by cuBLAS, once, when it starts


def dtype_of_blocks(precision: Precision) -> torch.dtype | None:
    """Return the type in which sharded blocks are computed.

    They are fetched in it, too. None is their own type.
    """
    return torch.bfloat16 if precision == "bf16" else None


@contextmanager
def computing(
    precision: Precision,
    device: torch.device,
    roles: Roles | None = None,
    deterministic: bool = False,
) -> Iterator[None]:
    """Compute networks in a run's precision within the block.

    In bf16, weights in single precision are cast at their use, and casts of trained weights are kept until the
    block ends. Casts of sharded `roles` are not kept: they would be whole, and might belong to an earlier block in
    the same memory. `deterministic` computes with deterministic algorithms alone.
    """
    mixed = precision == "bf16"
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=roles is None or not roles.sharded),
        keep_input_dtype(roles.layers if mixed and roles is not None else ()),
        _fast_kernels(device, mixed, deterministic),
        _same_kernels(deterministic),
    ):
        yield


def lay_out(roles: Roles, precision: Precision, device: torch.device) -> None:
    """Lay the weights of U-Nets out channels last.

    A GPU's convolutions in bf16 read them in this order. Call it before optimizers are made: their state has the
    weights' order in memory. Sharded weights stay as they are, and
    so do all weights in single precision or on a CPU.
    """
    if device.type == "cuda" and precision == "bf16" and not roles.sharded and isinstance(roles.backbone, WithUNet):
        channels_last(roles)


def channels_last(roles: Roles) -> None:
    """Lay the weights of all convolutions, and the average, out channels last."""
    for network in {id(n): n for n in roles.networks.values()}.values():
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, p in roles.trained["student"].items():
        roles.average[name] = torch.empty_like(p, dtype=roles.average[name].dtype).copy_(roles.average[name])


@contextmanager
def _fast_kernels(device: torch.device, mixed: bool, deterministic: bool) -> Iterator[None]:
    """Let a GPU use its fastest kernels within the block.

    The GPU tries which convolutions are fastest. In bf16, what is left in single precision is multiplied as TF32:
    TF32 holds every number of bf16. Trials end differently from process to process, so deterministic training has
    none. On a CPU nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    tried, matrices = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = not deterministic
    if mixed:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tried
        torch.set_float32_matmul_precision(matrices)


@contextmanager
def _same_kernels(wanted: bool) -> Iterator[None]:
    """Compute with deterministic algorithms alone within the block.

    Raises ValueError at an operation that has none.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    chosen = torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise ValueError(
            f"train.deterministic: got true, but the network calls {operation}, which has no deterministic "
            "implementation; set it to false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic = chosen


def fix_workspace(deterministic: bool) -> None:
    """Have cuBLAS start with the workspace that deterministic training needs.

    To be called before the GPU's first use. A workspace that the user has chosen stays.
    """
    if deterministic and not torch.cuda.is_initialized():
        os.environ.setdefault(WORKSPACE, FIXED[0])


def require_workspace(deterministic: bool, device: torch.device) -> None:
    """Check that cuBLAS has the workspace of deterministic training.

    Raises ValueError.
    """
    if deterministic and device.type == "cuda" and (got := os.environ.get(WORKSPACE)) not in FIXED:
        raise ValueError(
            f"train.deterministic: got true, but {WORKSPACE} is {got or 'not set'}, allowed are {' and '.join(FIXED)}; "
            f"start Python with {WORKSPACE}={FIXED[0]}"
        )
