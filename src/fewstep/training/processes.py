"""Several processes of one run (`accelerate launch`, torchrun): all of them train, the first one writes and speaks."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

PATIENCE = timedelta(hours=24)  # of a process for the others: the first one encodes, draws and measures while they wait

ENDED = "another process of this run has ended, see what it said; the last checkpoint is intact, the same command resumes"


def this_process() -> PartialState:
    """Its rank, its device, how many there are. Where there is no GPU, or none is wanted, processes meet on the CPU."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not (torch.cuda.is_available() or torch.xpu.is_available())
    return PartialState(cpu=cpu, timeout=PATIENCE)


def is_first() -> bool:
    """Whether this process is the one that writes: the only one, or the first of several."""
    return bool(this_process().is_main_process)


def mean_of(tensor: Tensor) -> Tensor:
    """The mean over all processes, each of which has to ask for it. Raises ConnectionError with one line where one has ended."""
    try:
        return reduce(tensor, "mean")
    except RuntimeError as error:
        raise ConnectionError(ENDED) from error


def any_of(asked: bool) -> bool:
    """Whether any process of the run was asked; all of them have to call it. Raises ConnectionError as `mean_of` does."""
    state = this_process()
    return asked if state.num_processes == 1 else bool(mean_of(torch.tensor(float(asked), device=state.device)) > 0)


@contextmanager
def with_others() -> Iterator[None]:
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
    return init_device_mesh(state.device.type, (state.num_processes,))


def together() -> None:
    """Wait until every process of the run is here."""
    this_process().wait_for_everyone()
