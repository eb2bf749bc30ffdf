"""Several processes of one run (`accelerate launch`, torchrun): all of them train, the first one writes and speaks."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

PATIENCE = timedelta(hours=24)  # of a process for the others: the first one encodes, draws and measures while they wait
TRAINING = timedelta(minutes=10)  # and within an iteration, where all do the same

ENDED = "another process of this run has ended or stands still, see what it said; the last checkpoint is intact, the same command resumes"


def this_process() -> PartialState:
    """Its rank, its device, how many there are. Where there is no GPU, or none is wanted, processes meet on the CPU."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not (torch.cuda.is_available() or torch.xpu.is_available())
    return PartialState(cpu=cpu, timeout=PATIENCE)


def is_first() -> bool:
    """Whether this process is the one that writes: the only one, or the first of several."""
    return bool(this_process().is_main_process)


@lru_cache(maxsize=1)
def _training() -> distributed.ProcessGroup:
    """All processes, within an iteration: one that does not come is missed in minutes. All have to ask for it first together."""
    return distributed.new_group(timeout=TRAINING)


@lru_cache(maxsize=1)
def _between() -> distributed.ProcessGroup:
    """All processes on their CPUs, between iterations: the first is waited for, which may draw and measure; it waits for nobody that long."""
    return distributed.new_group(timeout=TRAINING if is_first() else PATIENCE, backend="gloo")


def mean_of(tensor: Tensor) -> Tensor:
    """The mean over all processes, each of which has to ask for it. Raises ConnectionError with one line where one has ended."""
    with distributed_errors():
        total = tensor.clone()
        distributed.all_reduce(total, group=_training())
    return total / this_process().num_processes


def any_rank(asked: bool) -> bool:
    """Whether any process of the run was asked; all of them have to call it. Raises ConnectionError as `mean_of` does."""
    if this_process().num_processes == 1:
        return asked
    with distributed_errors():
        count = torch.tensor(float(asked))
        distributed.all_reduce(count, group=_between())
    return bool(count > 0)


def meet() -> None:
    """Wait between two iterations until every process is here, with the patience of `_between`."""
    any_rank(False)


def require_same(settings: Mapping[str, Any]) -> None:
    """Compare settings with those of the first process; all have to call it. Raises ValueError in every process where one has others."""
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
    if any_rank(bool(odd)):
        which = (
            f"{_where(first.get(odd[0]), json.loads(own).get(odd[0]), odd[0])} here"
            if odd
            else "other settings in another process"
        )
        raise ValueError(
            f"process {state.process_index} of {state.num_processes}: {which} than in process 0; start all of them with the same command and files"
        )


def _where(first: Any, own: Any, key: str) -> str:
    """The first place at which two JSON values differ, with what stands there."""
    if isinstance(first, dict) and isinstance(own, dict):
        inner = next(k for k in {**first, **own} if first.get(k) != own.get(k))
        return _where(first.get(inner), own.get(inner), f"{key}.{inner}")
    return f"{key} is another ({str(own)[:80]} and not {str(first)[:80]})"


def _from_first(text: str) -> str:
    """What the first process has, in all of them."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    with distributed_errors():
        size = torch.tensor(len(data))
        distributed.broadcast(size, 0, group=_between())
        told = data if is_first() else torch.empty(int(size), dtype=torch.uint8)
        distributed.broadcast(told, 0, group=_between())
    return bytes(told.tolist()).decode()


@contextmanager
def distributed_errors() -> Iterator[None]:
    """Within it, networks whose weights are spread over processes work. Raises ConnectionError with one line where one has ended."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise ConnectionError(ENDED) from error
        raise


def mesh_of_all() -> DeviceMesh:
    """All processes of the run in a row."""
    state = this_process()
    if state.num_processes == 1:
        return init_device_mesh(state.device.type, (1,))
    return DeviceMesh.from_group(_training(), state.device.type)


def barrier() -> None:
    """Wait until every process of the run is here."""
    this_process().wait_for_everyone()
