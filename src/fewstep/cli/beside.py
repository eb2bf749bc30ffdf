"""A job in a copy of this process, beside this one.

For counts that take seconds and whose results are a few numbers.
"""

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NoReturn, TypeVar

import torch

from .signals import NUMBERS

Result = TypeVar("Result")


def has_room() -> bool:
    """Return whether a copy of this process can work beside it.

    A copy cannot use a GPU that this process uses by now. Other systems than Linux copy no process, or not safely.
    """
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1 and not torch.cuda.is_initialized()


@contextmanager
def beside(job: Callable[[], Result], room: Callable[[], bool] = has_room) -> Iterator[Callable[[], Result]]:
    """Begin a job, and yield what waits for its result.

    The result is what JSON keeps as it is. Without room the job runs here, before the block. Where the copy fails, the
    job runs here when its result is asked for, and raises what it raises. What is not asked for ends with the block.
    """
    if not room():
        found = job()
        yield lambda: found
        return
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of other threads, whose locks a copy would wait for. Here they show progress alone, which
        # the copy does not.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _work(job, writer)
    os.close(writer)
    try:
        yield partial(_result, job, reader)
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _work(job: Callable[[], object], writer: int) -> NoReturn:
    """Do the job in the copy, send its result, and end."""
    try:
        for number in NUMBERS:
            signal.signal(number, signal.SIG_DFL)
        silent = os.open(os.devnull, os.O_WRONLY)
        for said in (1, 2):  # this process says what there is to say
            os.dup2(silent, said)
        sys.stdout = sys.stderr = os.fdopen(silent, "w")
        torch.set_num_threads(1)  # the threads of this process are not copied
        sent = json.dumps(job()).encode()
        with os.fdopen(writer, "wb") as out:
            out.write(sent)
    finally:
        os._exit(0)  # without what this process does at its end


def _result(job: Callable[[], Result], reader: int) -> Result:
    """Return what the copy sends; without it do the job here."""
    sent = b"".join(iter(partial(os.read, reader, 2**16), b""))
    try:
        found: Result = json.loads(sent)
    except ValueError:  # nothing, or a part
        return job()
    return found
