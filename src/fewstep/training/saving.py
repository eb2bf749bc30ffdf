"""Checkpoints that are written while the training goes on.

One checkpoint is written at a time: the next one waits. A checkpoint that does not fit the machine's memory a
second time is written while the training waits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..roles.roles import Roles
from ..roles.sharding import whole
from .optimizer import OptimizerName, state_bytes
from .state import save_checkpoint

if TYPE_CHECKING:
    from .loop import TrainConfig

Groups = Mapping[str, Mapping[str, Tensor]]
SHARE = 0.5  # of the free memory that a checkpoint may take while it is written
CGROUP = Path("/sys/fs/cgroup")  # Linux: what a container may take


class CheckpointWriter:
    """A writer of a run's checkpoints, one at a time."""

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.keep = run, keep
        # A thread of its own each: an executor's threads end while a run that nobody holds any more is collected.
        self._thread: Thread | None = None
        self._failed: list[BaseException] = []

    def save(self, step: int, groups: Groups, state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint, once the last one is written.

        The caller may change the tensors afterwards. Raises OSError where the one before could not be written.
        """
        self.wait()
        if SHARE * free_memory() < sum(t.numel() * t.element_size() for own in groups.values() for t in own.values()):
            save_checkpoint(self.run, step, groups, state, self.keep)
            return
        kept = {name: {n: _apart(t) for n, t in whole(own)} for name, own in groups.items()}
        self._thread = Thread(target=self._write, args=(step, kept, state), name=f"checkpoint {step}")
        self._thread.start()

    def _write(self, step: int, groups: Groups, state: Mapping[str, Any]) -> None:
        try:
            save_checkpoint(self.run, step, groups, state, self.keep)
        except BaseException as error:  # noqa: BLE001 - for the training's thread to raise
            self._failed.append(error)

    def check(self) -> None:
        """Raise the OSError of a checkpoint that could not be written."""
        if self._failed:
            raise self._failed.pop()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises OSError where it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def _apart(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU in memory of its own."""
    return torch.empty_like(tensor, device="cpu").copy_(tensor)


@contextmanager
def checkpoint_writer(run: Path, keep: int) -> Iterator[CheckpointWriter]:
    """Write checkpoints inside the block, all of them before the block ends.

    An error of the block comes before one of the writer.
    """
    writer = CheckpointWriter(run, keep)
    try:
        yield writer
    except GeneratorExit:  # the caller stops, and has saved
        writer.wait()
        raise
    except BaseException:
        with suppress(OSError):
            writer.wait()
        raise
    else:
        writer.wait()


def free_memory() -> int:
    """Return the bytes of memory that this process may take.

    What files keep in memory counts as free. Returns 0 where the machine does not say it.
    """
    free = _numbers(Path("/proc/meminfo")).get("MemAvailable:", 0) * 1024
    with suppress(OSError, ValueError):  # `max`, where nothing is limited, is no number
        most, now = (int((CGROUP / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        kept = _numbers(CGROUP / "memory.stat").get("inactive_file", 0)
        free = min(free, max(most - now + kept, 0))
    return free


def _numbers(file: Path) -> dict[str, int]:
    """Return the number behind each name in a file of Linux's."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


@dataclass(frozen=True)
class CheckpointSize:
    """What a run's checkpoints take on the disk.

    `each` is in bytes. `count` are written in all, of which the newest `keep` stay.
    """

    each: int
    count: int
    keep: int

    @property
    def most(self) -> int:
        """Bytes at most: an old one goes after a new one."""
        return self.each * min(self.keep + 1, self.count)


def checkpoint_size(roles: Roles, config: "TrainConfig") -> CheckpointSize:
    """Return what the checkpoints of a run take."""
    count = -(-config.iterations // config.checkpoint_every)
    return CheckpointSize(checkpoint_bytes(roles, config.optimizer), count, config.keep)


def checkpoint_bytes(roles: Roles, optimizer: OptimizerName) -> int:
    """Return the bytes of a checkpoint.

    It holds all that is trained, its optimizer's state, and the average.
    """
    trained = [p for own in roles.trained.values() for p in own.values()]
    tensors = sum(t.numel() * t.element_size() for t in (*trained, *roles.average.values()))
    return tensors + state_bytes(trained, optimizer)
