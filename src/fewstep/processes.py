"""Several processes of one run (`accelerate launch`, torchrun).

All processes train; the first process writes and prints.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

PATIENCE = timedelta(hours=24)  # wait between iterations: the first process encodes, samples and measures meanwhile
TRAINING = timedelta(minutes=10)  # wait within an iteration, where all processes do the same work

Made = TypeVar("Made")
ENDED = (
    "another process of this run has ended or stands still, see what it said; "
    "the last checkpoint is intact, the same command resumes"
)


def this_process() -> PartialState:
    """Return this process's rank and device, and the number of processes.

    Without a GPU, or where none is wanted, processes communicate on the CPU.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not (torch.cuda.is_available() or torch.xpu.is_available())
    return PartialState(cpu=cpu, timeout=PATIENCE)


def is_first() -> bool:
    """Return whether this process writes.

    The only process of a run writes, or the first of several.
    """
    return bool(this_process().is_main_process)


@lru_cache(maxsize=1)
def _training() -> distributed.ProcessGroup:
    """Return the group of all processes within an iteration.

    A missing process is noticed after minutes. All processes have to make the first call together.
    """
    return distributed.new_group(timeout=TRAINING)


@lru_cache(maxsize=1)
def between_iterations() -> distributed.ProcessGroup:
    """Return the group of all processes between iterations.

    The group communicates on the CPUs. The other processes wait long for the first process, which may sample
    and measure; the first process waits only as long as within an iteration.
    """
    return distributed.new_group(timeout=TRAINING if is_first() else PATIENCE, backend="gloo")


@lru_cache(maxsize=1)
def _starting() -> distributed.ProcessGroup:
    """Return the group of all processes before the first iteration.

    The group communicates on the CPUs. Every process may load and prepare for as long as it takes.
    """
    return distributed.new_group(timeout=PATIENCE, backend="gloo")


def sum_of_all(tensor: Tensor) -> distributed.Work:
    """Begin to sum a tensor over all processes, in place.

    All processes have to call, in the same order. Whoever needs the sum waits for the work that is returned.
    """
    under_way = distributed.all_reduce(tensor, group=_training(), async_op=True)
    assert under_way is not None
    return under_way


def any_rank(asked: bool, starting: bool = False) -> bool:
    """Return whether `asked` is true in any process.

    The processes ask between two iterations, or before the first one (`starting`).

    All processes have to call. Raises ConnectionError with one line if a process has ended.
    """
    if this_process().num_processes == 1:
        return asked
    with distributed_errors():
        count = torch.tensor(float(asked))
        distributed.all_reduce(count, group=_starting() if starting else between_iterations())
    return bool(count > 0)


def meet() -> None:
    """Wait between two iterations until every process arrives.

    The wait is as long as `between_iterations` allows.
    """
    any_rank(False)


def gathered(value: dict[str, str]) -> list[dict[str, str]]:
    """Return the values of all processes, in their order.

    All processes have to call. Raises ConnectionError with one line if a process has ended.
    """
    found: list[dict[str, str]] = [value] * this_process().num_processes
    with distributed_errors():
        distributed.all_gather_object(found, value, group=between_iterations())
    return found


def require_same(settings: Mapping[str, Any]) -> None:
    """Check that all processes have the settings of the first process.

    All processes have to call. Raises ValueError in every process if the settings of any process differ.
    """
    state = this_process()
    if state.num_processes == 1:
        return
    own = json.dumps(settings, sort_keys=True, default=str)
    first = json.loads(_from_first(own))
    odd = [
        key
        for key in {**first, **settings}
        if json.dumps(first.get(key), sort_keys=True, default=str)
        != json.dumps(settings.get(key), sort_keys=True, default=str)
    ]
    if any_rank(bool(odd), starting=True):
        which = (
            f"{_where(first.get(odd[0]), json.loads(own).get(odd[0]), odd[0])} here"
            if odd
            else "other settings in another process"
        )
        raise ValueError(
            f"process {state.process_index} of {state.num_processes}: {which} than in process 0; "
            "start all of them with the same command and files"
        )


def _where(first: Any, own: Any, key: str) -> str:
    """Describe the first difference between two JSON values."""
    if isinstance(first, dict) and isinstance(own, dict):
        inner = next(k for k in {**first, **own} if first.get(k) != own.get(k))
        return _where(first.get(inner), own.get(inner), f"{key}.{inner}")
    return f"{key} is another ({str(own)[:80]} and not {str(first)[:80]})"


def _from_first(text: str) -> str:
    """Return the first process's text in all processes."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    with distributed_errors():
        size = torch.tensor(len(data))
        distributed.broadcast(size, 0, group=_starting())
        told = data if is_first() else torch.empty(int(size), dtype=torch.uint8)
        distributed.broadcast(told, 0, group=_starting())
    return bytes(told.tolist()).decode()


@contextmanager
def distributed_errors() -> Iterator[None]:
    """Turn distributed errors into ConnectionError within the block.

    Sharded networks are called within this block. Raises ConnectionError with one line if a process has
    ended.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise ConnectionError(ENDED) from error
        raise


REPLICATE, SHARD = "replicate", "shard"  # the dimensions of a mesh


def require_replicas(replicas: int, option: str = "train") -> None:
    """Check that the processes can hold so many replicas of sharded weights.

    Raises ValueError otherwise.
    """
    count = this_process().num_processes
    if count > 1 and count % replicas:
        raise ValueError(
            f"{option}.replicas: got {replicas}, allowed are divisors of the number of processes, {count}; "
            f"set it to the number of machines"
        )


@lru_cache
def mesh_of(replicas: int) -> DeviceMesh:
    """Return the mesh of all processes, a row for each replica.

    One replica is a mesh of one dimension. Neighbours, which are the processes of one machine, stand in one row. All
    processes have to make the first call together.
    """
    state = this_process()
    count = state.num_processes
    if count == 1:
        return init_device_mesh(state.device.type, (1,))
    if replicas == 1:
        return DeviceMesh.from_group(_training(), state.device.type, mesh_dim_names=(SHARD,))
    ranks = torch.arange(count).view(replicas, -1)
    groups = {}
    for name, lists in ((REPLICATE, ranks.T.tolist()), (SHARD, ranks.tolist())):
        for members in lists:  # every process makes all groups
            made = distributed.new_group(members, timeout=TRAINING)
            if state.process_index in members:
                groups[name] = made
    return DeviceMesh.from_group(
        [groups[REPLICATE], groups[SHARD]], state.device.type, mesh=ranks, mesh_dim_names=(REPLICATE, SHARD)
    )


@lru_cache
def context_mesh(count: int) -> DeviceMesh:
    """Return a mesh whose last dimension is `count` neighbours.

    They share the tokens of each sample. All processes have to make the first call together.
    """
    state = this_process()
    shape = (state.num_processes // count, 1, count)
    return init_device_mesh(state.device.type, shape, mesh_dim_names=("samples", "ring", "ulysses"))


def in_turn(make: Callable[[], Made]) -> Made:
    """Call `make` in one process of a machine after another.

    Returns what it returns in this process. All processes have to call.
    """
    state, made = this_process(), list[Made]()
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))):
        if turn == state.local_process_index:
            made.append(make())
        barrier()
    return made[0]


def barrier() -> None:
    """Wait until every process of the run arrives."""
    this_process().wait_for_everyone()
